//! Training: one step, its schedule, and whole runs with their files.

mod data_parallel;
mod run;
mod settings;
mod step;

pub use data_parallel::Sharding;
pub use run::checkpoint::{check_last_checkpoint, config_of_run};
pub use run::metrics::Metrics;
pub use run::report::{Event, PretrainReport};
pub use run::{pretrain, pretrain_together};
pub use settings::{FIELDS, Field, Kind, MustMatch, PretrainSettings, RunLength};
pub use step::schedule::Schedule;
pub use step::trainer::{OptimizerSettings, OptimizerState, StepReport, Trainer};

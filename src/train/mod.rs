//! Training: one step, its schedule, and whole runs with their files.

mod agreement;
mod average;
mod checkpoint;
mod folder;
mod metrics;
mod moments;
mod outputs;
mod passes;
mod pretrain;
mod report;
mod schedule;
mod settings;
mod starvation;
mod tensorboard;
mod together;
mod trainer;
mod validation;

pub use checkpoint::{check_last_checkpoint, config_of_run};
pub use metrics::Metrics;
pub use pretrain::{pretrain, pretrain_together};
pub use report::{Event, PretrainReport};
pub use schedule::Schedule;
pub use settings::{PretrainSettings, RunLength};
pub use together::Sharding;
pub use trainer::{OptimizerSettings, OptimizerState, StepReport, Trainer};

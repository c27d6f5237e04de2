//! Training: one step, its schedule, and whole runs with their files.

mod checkpoint;
mod folder;
mod metrics;
mod passes;
mod pretrain;
mod schedule;
mod tensorboard;
mod trainer;

pub use checkpoint::config_of_run;
pub use metrics::Metrics;
pub use pretrain::{Event, PretrainReport, PretrainSettings, RunLength, pretrain};
pub use schedule::Schedule;
pub use trainer::{OptimizerSettings, OptimizerState, StepReport, Trainer};

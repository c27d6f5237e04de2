//! Training: one step, its schedule, and whole runs with their files.

mod schedule;
mod trainer;

pub use schedule::Schedule;
pub use trainer::{OptimizerSettings, OptimizerState, StepReport, Trainer};

//! One optimiser step and what it keeps: trainer, schedule, graphs, averaged weights.

pub(in crate::train) mod average;
pub(in crate::train) mod graphs;
pub(in crate::train) mod schedule;
pub(in crate::train) mod trainer;

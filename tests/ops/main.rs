//! Every op of the CPU backend against plain loops in f64, against differences, over thread counts and odd sizes.

mod adamw;
mod attention;
#[path = "../common/mod.rs"]
mod common;
mod cross_entropy;
mod layernorm;
mod linear;
mod loss;
mod masking;
mod patchify;
mod support;
mod tokens;

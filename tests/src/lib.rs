//! What acceptance tests, the demo and the benchmarks share: real processes, clients, made-up models, numbers.
//!
//! Nothing imports this crate.

pub mod bench;
pub mod cache;
pub mod demo;
pub mod http;
pub mod models;
pub mod node;
pub mod oip;
pub mod process;
pub use faaswap_simulation::random;
pub mod stats;
pub mod trouble;

pub use trouble::{Result, Trouble};

//! What acceptance tests, the demo and the benchmarks share: real processes, clients, made-up models, numbers.
//!
//! Only the tests for GPUs import this crate: they start the same processes and speak to them in the same way.

pub mod bench;
pub mod cache;
pub mod demo;
pub mod http;
pub mod models;
pub mod node;
pub mod oip;
pub mod ports;
pub mod process;
pub use faaswap_simulation::random;
pub mod stats;
pub mod trouble;

pub use trouble::{Result, Trouble};

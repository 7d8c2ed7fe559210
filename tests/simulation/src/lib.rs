//! A discrete-event simulation of nodes around the real scheduler: what it decides here, it decides in the broker.
//!
//! Everything follows from a seed. Costs are published ones for the paper's hardware and measured ones for ours.

pub mod catalog;
pub mod figures;
pub mod optimum;
pub mod outcome;
pub mod plot;
pub mod random;
pub mod recorded;
pub mod report;
pub mod scenario;
pub mod search;
pub mod workload;
pub mod world;

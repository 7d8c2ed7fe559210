//! The broker of one node: functions register, requests come, and this is where it is seen to that they are run.
//!
//! [`serve`] is the process; its loop is the one place where deciding (`scheduler`) and touching (`device`, `engine`)
//! meet. Settings are in [`config`], models on disk and in host memory in [`store`].

mod admin;
mod bound;
pub mod cli;
pub mod config;
mod core;
pub mod device_plugin;
mod devices;
mod frames;
mod gpus;
mod lane;
pub mod limits;
mod load;
mod mailbox;
mod registrar;
pub mod replay;
pub mod serve;
mod socket;
pub mod store;
mod suspects;
pub mod telemetry;
mod timer;
mod trace;
mod turns;
mod variant;
mod verify;

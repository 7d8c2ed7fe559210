//! The sidecar: how the world speaks to a function, and how a function reaches the broker.
//!
//! Decides nothing about devices. `broker` is the client of the broker, usable without HTTP; `http` and `grpc` speak the
//! Open Inference Protocol v2; `infer` is what both share; `server` owns the sockets.

#![warn(missing_docs)]

pub mod app;
pub mod broker;
pub mod config;
pub mod failure;
pub mod grpc;
pub mod http;
pub mod infer;
pub mod limits;
pub mod metrics;
pub mod model;
pub mod server;

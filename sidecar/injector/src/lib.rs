//! The injector: a mutating webhook that gives pods the sidecar, or the broker's socket, that their annotations ask for.
//!
//! [`wish`] reads annotations and says what is wrong with them; [`inject`] changes a pod, purely; [`review`] is what the
//! API server asks and is told; [`certificate`] makes certificates and [`keeper`] keeps them fresh in the cluster;
//! [`server`] owns the ports. What the sidecar then does is its own business.

#![warn(missing_docs)]

pub mod certificate;
pub mod inject;
pub mod keeper;
pub mod limits;
pub mod parts;
pub mod review;
pub mod server;
pub mod settings;
pub mod telemetry;
pub mod wish;

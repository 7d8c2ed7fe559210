//! The sidecar: how the world speaks to a function, and how a function reaches the broker.
//!
//! Decides nothing about devices. [`broker`] is the client of the broker, usable without HTTP; [`mod@http`] and [`grpc`]
//! speak the Open Inference Protocol v2; [`infer`] is what both share; [`server`] owns the sockets; [`watchdog`] is the
//! function's front on OpenFaaS; [`fetch`] brings models from servers; [`vision`] makes tensors of images; [`app`] joins them.
//!
//! The client alone:
//!
//! ```no_run
//! use std::{path::PathBuf, time::Duration};
//!
//! use bytes::Bytes;
//! use faaswap_protocol::{Batching, DType, FunctionSpec, Late, Priority, Slo, Tf32};
//! use faaswap_sidecar::{
//!     broker::{Broker, BrokerConfig, InferRequest, Target},
//!     model::{ModelRef, ModelSource},
//! };
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! // Reads every byte of the model, to name it by its digest.
//! let model = ModelSource::load(&ModelRef::File { graph: PathBuf::from("resnet.onnx"), data: Vec::new() })?;
//! let function = FunctionSpec {
//!     name: "team/resnet".parse()?,
//!     model: model.digest,
//!     slo: Slo { deadline: Duration::from_millis(50), percentile: 9800 },
//!     priority: Priority::Latency,
//!     late: Late::Serve,
//!     batching: Batching::default(),
//!     tf32: Tf32::default(),
//! };
//! // `Target::Address("node:9470".into())` where no Unix socket is shared: tensors then travel in the frames.
//! let target = Target::Socket(PathBuf::from("/run/faaswap/broker.sock"));
//! let client = Broker::start(BrokerConfig::new(target, function, model));
//! let known = client.until_ready().await?;
//!
//! let pixels = Bytes::from(vec![0; 4 * 3 * 224 * 224]);
//! let input = known.input("input").ok_or("no such input")?;
//! let request = InferRequest::default()
//!     .input(input, DType::F32, &[1, 3, 224, 224], pixels)?
//!     .within(Duration::from_millis(200));
//! let answer = client.infer(&request).await?;
//! for output in &answer.outputs {
//!     // Bytes of the slab, not a copy: the broker gets its memory back when the last of them is dropped.
//!     println!("{}: {} {}, {} bytes", output.index, output.dtype, output.shape, output.data.len());
//! }
//! println!("ran {:?}, resident: {}", answer.timing.ran, answer.timing.was_resident);
//! # Ok(())
//! # }
//! ```
//!
//! A client's tasks live on the runtime on which it was started; one thread gives the least latency.

#![warn(missing_docs)]

pub mod app;
pub mod broker;
pub mod config;
pub mod failure;
pub mod fetch;
pub mod grpc;
pub mod http;
pub mod infer;
pub mod limits;
pub mod metrics;
pub mod model;
pub mod server;
pub mod vision;
pub mod watchdog;

//! The models that functions are made of: found, prepared once for the devices, and what a plain session answers to them.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use faaswap_broker::store;
use faaswap_device::cuda::{CudaConfig, CudaDevice};
use faaswap_engine::{CudaTarget, Input, InputData, PlainSession, Prepared, Runtime, Target};
use faaswap_protocol::{Bytes, DType, Shape};

use super::options::Options;
use crate::{Result, model, prepared};

/// Deadlines of the published evaluation.
const DEADLINE: Duration = Duration::from_millis(80);
const DEADLINE_OF_BERT: Duration = Duration::from_millis(200);

/// One architecture.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub(crate) name: String,
    /// The original graph.
    pub(crate) graph: PathBuf,
    pub(crate) prepared: Prepared,
    pub(crate) deadline: Duration,
    /// What its functions are asked.
    pub(crate) inputs: Vec<(DType, Shape, Vec<u8>)>,
}

impl Base {
    pub(crate) fn weights(&self) -> Bytes {
        self.prepared.manifest().weights_bytes
    }
}

/// The models of a folder, prepared for the devices of this run.
pub(crate) fn all(options: &Options) -> Result<Vec<Base>> {
    let found = model::found(&options.models)?;
    let named = |name: &str| ["-fp32", "-fp16"].iter().any(|end| name.ends_with(end));
    let is_wanted = |name: &str| match &options.only {
        Some(only) => name == only,
        None => !named(name) || name.ends_with(&format!("-{}", options.dtype)),
    };
    let wanted: Vec<_> = found.into_iter().filter(|(name, _)| is_wanted(name)).collect();
    if wanted.is_empty() {
        return Err(format!("{} has no model of {}", options.models.display(), options.dtype).into());
    }
    let mut prepared = if options.devices.is_host() {
        on_host(options, &wanted)?
    } else {
        prepared::these(&wanted, &options.models)?.into_iter().collect()
    };
    let mut bases = Vec::new();
    for (name, folder) in wanted {
        let Some(prepared) = prepared.remove(&name) else {
            println!("  {name} cannot be prepared, and is left out");
            continue;
        };
        let usual = if name.starts_with("bert") { DEADLINE_OF_BERT } else { DEADLINE };
        let inputs = model::inputs(&prepared.manifest().signature)?;
        let (graph, deadline) = (folder.join("model.onnx"), options.deadline.unwrap_or(usual));
        bases.push(Base { name, graph, prepared, deadline, inputs });
    }
    Ok(bases)
}

type Named = BTreeMap<String, Prepared>;

fn on_host(options: &Options, wanted: &[(String, PathBuf)]) -> Result<Named> {
    let mut prepared = Named::new();
    for (name, model) in wanted {
        let folder = options.out.join("prepared-host").join(name);
        let there = Prepared::open(&folder).or_else(|_| model::prepare_for(model, &folder, Target::Cpu));
        match there {
            Ok(there) => drop(prepared.insert(name.clone(), there)),
            Err(error) => println!("  {name}: {error}"),
        }
    }
    Ok(prepared)
}

/// How the broker names machines like this one, in the folders of what it has prepared; and what the device is called.
pub(crate) fn flavour(options: &Options) -> Result<(String, String)> {
    if options.devices.is_host() {
        return Ok((store::flavour(None), "host device".to_owned()));
    }
    let config = CudaConfig { memory: Some(Bytes::mib(64)), lanes: 1, ..model::config(0)? };
    let device = CudaDevice::open(&config)?;
    Ok((store::flavour(Some((device.capability()?, CudaTarget::new(0).tf32))), device.gpu_name()?))
}

/// What a plain session of the original says, all outputs one after the other, each with its type and size.
pub(crate) fn reference(runtime: &Runtime, base: &Base) -> Result<Vec<Vec<u8>>> {
    let target = match base.prepared.manifest().target {
        Target::Cpu => Target::Cpu,
        Target::Cuda(cuda) => Target::Cuda(CudaTarget { channels_last: false, ..cuda }),
    };
    let plain = PlainSession::open_for(runtime, target, &base.graph, false)?;
    let inputs: Vec<_> = base
        .inputs
        .iter()
        .map(|(dtype, shape, data)| Input { dtype: *dtype, shape, data: InputData::Bytes(data) })
        .collect();
    Ok(plain.run(&inputs)?.into_iter().map(|(_, bytes)| bytes).collect())
}

/// The largest difference of an answer to the reference, beside the largest value.
pub(crate) fn difference(base: &Base, ours: &[Vec<u8>], theirs: &[Vec<u8>]) -> f64 {
    let specs = &base.prepared.manifest().signature.outputs;
    if ours.len() != theirs.len() || ours.len() != specs.len() {
        return f64::INFINITY;
    }
    let pairs = specs.iter().zip(ours.iter().zip(theirs));
    pairs
        .map(|(spec, (ours, theirs))| match spec.dtype == DType::F32 || spec.dtype == DType::F16 {
            true => model::difference(spec.dtype, ours, theirs),
            false if ours == theirs => 0.0,
            false => f64::INFINITY,
        })
        .fold(0.0, f64::max)
}

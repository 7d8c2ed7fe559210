//! What operators are shown: functions, models and devices as they are now.

use faaswap_protocol::Tf32;
use serde::Serialize;

use super::{Core, DecisionReport, device_id};

/// One function.
#[derive(Debug, Serialize)]
pub(crate) struct FunctionReport {
    name: String,
    model: String,
    /// What it says of TF32; `node`: what the node does.
    tf32: Tf32,
    slo_ms: f64,
    slo_percentile: f64,
    connections: usize,
    answered: u64,
    refused: u64,
    slo_met: u64,
}

/// One model.
#[derive(Debug, Serialize)]
pub(crate) struct ModelReport {
    model: String,
    /// Whether GPUs may compute its fp32 products in TF32; null on host devices, which have no such choice.
    tf32: Option<bool>,
    weights_bytes: u64,
    /// Whether they are in host memory; else they are on disk, or on the way.
    in_host_memory: bool,
    functions: usize,
    /// Devices that it can be brought to.
    bound: Vec<String>,
    /// Devices that it is on, or on the way to or from.
    on: Vec<String>,
    /// For how long it is not run any more, because it was running when devices were lost; null where it is run.
    suspended_s: Option<u64>,
}

/// One device.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceReport {
    pub(crate) name: String,
    capacity_bytes: u64,
    charged_bytes: u64,
    mapped_bytes: u64,
    lanes: usize,
    lost: bool,
}

/// Everything.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) functions: Vec<FunctionReport>,
    pub(crate) models: Vec<ModelReport>,
    pub(crate) devices: Vec<DeviceReport>,
    pub(crate) decisions: Vec<DecisionReport>,
}

impl Core {
    pub(crate) fn report(&mut self) -> Report {
        self.take_ended();
        let functions = self.functions.values().map(|function| FunctionReport {
            name: function.spec.name.to_string(),
            model: function.spec.model.to_string(),
            tf32: function.spec.tf32,
            slo_ms: function.spec.slo.deadline.as_secs_f64() * 1e3,
            slo_percentile: f64::from(function.spec.slo.percentile) / 100.0,
            connections: function.users,
            answered: function.answered,
            refused: function.refused.values().sum(),
            slo_met: function.slo_met,
        });
        let name = |index: usize| self.devices[index].device.info().name.clone();
        let models = self.models.values().map(|model| ModelReport {
            model: model.variant.digest.to_string(),
            tf32: model.variant.tf32,
            weights_bytes: model.loaded.weights.get(),
            in_host_memory: model.loaded.home.is_in_memory(),
            functions: model.functions,
            bound: model.loaded.bound.iter().map(|(device, _)| name(usize::from(device.0))).collect(),
            on: model.on.iter().map(|device| name(usize::from(device.0))).collect(),
            suspended_s: self.suspects.suspended_for(&model.variant.digest).map(|left| left.as_secs()),
        });
        let devices = self.devices.iter().enumerate().map(|(index, entry)| DeviceReport {
            name: entry.device.info().name.clone(),
            capacity_bytes: entry.device.info().capacity.get(),
            charged_bytes: self.scheduler.charged(device_id(index)).unwrap_or_default().0.get(),
            mapped_bytes: entry.device.memory().mapped.get(),
            lanes: entry.lanes.len(),
            lost: entry.lost,
        });
        let (mut functions, mut models): (Vec<_>, Vec<_>) = (functions.collect(), models.collect());
        functions.sort_by(|a, b| a.name.cmp(&b.name));
        models.sort_by(|a, b| (&a.model, a.tf32).cmp(&(&b.model, b.tf32)));
        let (devices, decisions) = (devices.collect(), self.decisions());
        Report { functions, models, devices, decisions }
    }
}

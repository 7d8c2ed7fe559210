//! A model that a worker has bound, as the broker's lanes see one.

use std::sync::Arc;

use faaswap_device::{DeviceError, Group, RangeId};
use faaswap_engine::{AskPlace, EngineError, Input, Manifest, Prepared, RunError, RunOutput};
use faaswap_protocol::Detail;

use crate::{
    channel::Channel,
    life::Life,
    message::{Answer, ModelId, ToWorker},
    remote::RemoteDevice,
};

/// A model in a worker, for one life of it.
#[derive(Debug)]
pub struct RemoteModel {
    device: Arc<RemoteDevice>,
    life: Arc<Life>,
    number: ModelId,
    range: Option<RangeId>,
    is_twin: bool,
    manifest: Arc<Manifest>,
    groups: Arc<[Group]>,
}

impl RemoteModel {
    /// Has the device's worker bind a prepared model. Blocks.
    pub fn bind(device: &Arc<RemoteDevice>, prepared: &Prepared) -> Result<Self, EngineError> {
        let (life, number) = (device.life(), device.new_model());
        let path = prepared.dir().to_owned();
        match life.ask(|call| ToWorker::Bind { call, model: number, prepared: path })? {
            Answer::Bound { has_range, is_twin } => {
                let range = has_range.then(|| device.range_of(&life, number));
                let (manifest, groups) = (Arc::clone(prepared.manifest()), prepared.groups());
                Ok(Self { device: Arc::clone(device), life, number, range, is_twin, manifest, groups })
            }
            Answer::Done
            | Answer::SwappedIn { .. }
            | Answer::SwappedOut { .. }
            | Answer::Compared { .. }
            | Answer::Knows(_) => Err(DeviceError::Invalid("a worker binds a model and says something else").into()),
        }
    }

    /// The range to swap in and out; `None` when the model has no weights to swap.
    pub fn range(&self) -> Option<RangeId> {
        self.range
    }

    /// The groups to swap in.
    pub fn groups(&self) -> Arc<[Group]> {
        Arc::clone(&self.groups)
    }

    /// What is known of the model.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether its program is made of another model's of its kind, without a session.
    pub fn is_twin(&self) -> bool {
        self.is_twin
    }

    /// Whether the worker that has bound it is gone.
    pub fn is_lost(&self) -> bool {
        self.life.is_lost()
    }

    /// Runs the model once, as [`faaswap_engine::Bound::run`] does, but that places are asked for behind the run. At most as many
    /// at a time on one device as it has lanes.
    pub fn run(
        &self,
        inputs: &[Input<'_>],
        wanted: &[u16],
        place: &mut AskPlace<'_>,
    ) -> Result<Vec<RunOutput>, RunError> {
        let run = |channel: &mut Channel, after| channel.run((self.number, after), inputs, wanted, place);
        let ran = self.life.with_channel(run);
        ran.unwrap_or_else(|| Err(RunError::Failed(Detail::from("more runs at a time than the device has lanes"))))
    }
}

impl Drop for RemoteModel {
    fn drop(&mut self) {
        // A worker that is gone has taken it along.
        let _ = self.life.say(&ToWorker::Unbind { model: self.number }, &[]);
        self.range.inspect(|range| self.device.forget(*range));
    }
}

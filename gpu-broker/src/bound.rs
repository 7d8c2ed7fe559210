//! A model on a device: bound in this process, or by the device's worker.

use std::sync::Arc;

use faaswap_device::{Group, RangeId};
use faaswap_engine::{AskPlace, Bound, EngineError, Input, Manifest, Prepared, RunError, RunOutput, Runtime};
use faaswap_worker::RemoteModel;

use crate::devices::Opened;

/// See [`Bound`], whose methods these are.
#[derive(Debug)]
pub(crate) enum BoundThere {
    Here(Box<Bound>),
    InWorker(RemoteModel),
}

impl BoundThere {
    /// Binds a model to a device. Blocks.
    pub(crate) fn new(runtime: &Runtime, prepared: &Prepared, opened: &Opened) -> Result<Self, EngineError> {
        match opened {
            Opened::Here(device) => Bound::new(runtime, prepared, device).map(|bound| Self::Here(Box::new(bound))),
            Opened::InWorker(device) => RemoteModel::bind(device, prepared).map(Self::InWorker),
        }
    }

    pub(crate) fn range(&self) -> Option<RangeId> {
        match self {
            Self::Here(bound) => bound.range(),
            Self::InWorker(model) => model.range(),
        }
    }

    pub(crate) fn groups(&self) -> Arc<[Group]> {
        match self {
            Self::Here(bound) => bound.groups(),
            Self::InWorker(model) => model.groups(),
        }
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        match self {
            Self::Here(bound) => bound.manifest(),
            Self::InWorker(model) => model.manifest(),
        }
    }

    pub(crate) fn is_twin(&self) -> bool {
        match self {
            Self::Here(bound) => bound.is_twin(),
            Self::InWorker(model) => model.is_twin(),
        }
    }

    /// Whether the process that has bound it is gone.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Self::Here(_) => false,
            Self::InWorker(model) => model.is_lost(),
        }
    }

    pub(crate) fn run(
        &self,
        inputs: &[Input<'_>],
        wanted: &[u16],
        place: &mut AskPlace<'_>,
    ) -> Result<Vec<RunOutput>, RunError> {
        match self {
            Self::Here(bound) => bound.run(inputs, wanted, place),
            Self::InWorker(model) => model.run(inputs, wanted, place),
        }
    }

    /// Whether inputs in a slab would be read there if it were registered. A worker has them in memory of its own.
    pub(crate) fn would_read_in_place(&self, inputs: &[Input<'_>]) -> bool {
        match self {
            Self::Here(bound) => bound.would_read_in_place(inputs),
            Self::InWorker(_) => false,
        }
    }

    /// Whether there is something to do behind a run's answer. A worker does it itself.
    pub(crate) fn is_unsettled(&self) -> bool {
        match self {
            Self::Here(bound) => bound.is_unsettled(),
            Self::InWorker(_) => false,
        }
    }

    pub(crate) fn settle(&self) {
        match self {
            Self::Here(bound) => bound.settle(),
            Self::InWorker(_) => {}
        }
    }
}

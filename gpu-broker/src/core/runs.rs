//! Runs: from what the scheduler has decided to the lane that does it.

use std::{sync::Arc, time::Duration};

use faaswap_protocol::{Batching, Refusal};
use faaswap_scheduler::{DeviceId, Event, FunctionKey, LaneId, ModelId, RequestKey};

use super::Core;
use crate::lane::Run;

impl Core {
    /// Hands a run to its lane; its requests may be those of several functions with the same model.
    pub(super) fn run(
        &mut self,
        request: RequestKey,
        with: &[RequestKey],
        model: ModelId,
        (device, lane): (DeviceId, LaneId),
        resident: bool,
    ) {
        let bound = self.bound(model, device).map(|(bound, _)| bound);
        let mut ask_of = |request: &RequestKey| {
            let found = self.requests.get_mut(request)?;
            found.resident = bound.as_ref().is_some_and(|model| model.found_by(found.ask.arrived, resident));
            Some((Arc::clone(&found.ask), found.function))
        };
        let first = ask_of(&request);
        let (with_asks, mut whose): (Vec<_>, Vec<_>) = with.iter().filter_map(ask_of).unzip();
        let handed = match (first, bound) {
            (Some((ask, function)), Some(model)) => {
                whose.push(function);
                if whose.len() > 1 {
                    self.telemetry.shared_run(whose.len(), whose.iter().any(|other| *other != function));
                }
                let is_shared = !with_asks.is_empty();
                let digest = model.digest;
                let run = Run { ask, with: with_asks, batching: self.strictest(&whose), model, resident };
                let lanes = &self.devices[usize::from(device.0)].lanes;
                let handed = lanes.get(usize::from(lane.0)).is_some_and(|lane| lane.run(run));
                self.shared_runs += usize::from(handed && is_shared);
                // What begins on a device that is lost already did not cost it.
                self.suspect_what_runs();
                if handed {
                    self.suspects.begins(request, digest, device);
                }
                handed
            }
            (None, _) | (_, None) => false,
        };
        if !handed {
            // A lane that the scheduler believes to be idle takes a run; where it does not, the request must not hang.
            tracing::error!(?request, ?device, ?lane, "a run could not be handed to its lane");
            for one in with.iter().chain([&request]) {
                self.refuse(*one, Refusal::HardwareFault);
            }
            self.events.push_back(Event::RunDone { request, took: Duration::ZERO });
        }
    }

    /// On what condition requests of these functions may share a run. One that is gone takes none.
    fn strictest(&self, whose: &[FunctionKey]) -> Batching {
        let batching = whose.iter().map(|key| self.functions.get(key).map_or(Batching::Off, |one| one.spec.batching));
        batching.min().unwrap_or(Batching::Off)
    }
}

//! Requests whose weights are on disk: they wait out here while these are read, and take no lane and no link.
//!
//! A disk is many times slower than a link. What the scheduler starts holds a lane, and the swap-in behind it the link,
//! until the last group is there; so it hears of a request only when the end of the reading is near. The swap-in then
//! follows the rest.

use faaswap_scheduler::{Event, Form, FunctionKey, ModelId, Moment, RequestKey};

use super::{Core, Refusal};
use crate::{mailbox::Ended, store::Held};

/// Requests that wait for one model's weights.
#[derive(Debug)]
pub(super) struct FromDisk {
    requests: Vec<Waiting>,
    /// Keeps the weights where they are brought to.
    held: Held,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    request: RequestKey,
    function: FunctionKey,
    deadline: Moment,
    form: Option<Form>,
}

impl Core {
    /// Tells the scheduler of a request, now or when its weights are nearly read from disk.
    pub(super) fn arrived(
        &mut self,
        model: ModelId,
        request: RequestKey,
        function: FunctionKey,
        (deadline, form): (Moment, Option<Form>),
    ) {
        // Requests that come and go between two looks are no quiet either.
        self.quiet_since = None;
        if !self.waits_for_disk(model, Waiting { request, function, deadline, form }) {
            self.happen(Event::Arrived { request, function, deadline, form });
        }
    }

    fn waits_for_disk(&mut self, id: ModelId, waiting: Waiting) -> bool {
        let Some(model) = self.models.get_mut(&id) else { return false };
        if let Some(from_disk) = &mut model.from_disk {
            from_disk.requests.push(waiting);
            return true;
        }
        if self.draining || !model.on.is_empty() || model.loaded.weights == faaswap_protocol::Bytes::ZERO {
            return false;
        }
        let mailbox = std::sync::Arc::clone(&self.mailbox);
        let near = Box::new(move || mailbox.post(Ended::NearlyRead { model: id }));
        // Where they cannot be brought, the swap-in says why.
        let Ok(Some(held)) = model.loaded.home.bring(near) else { return false };
        model.from_disk = Some(FromDisk { requests: vec![waiting], held });
        true
    }

    /// The weights are nearly there, or will not come: either way the scheduler's turn.
    pub(super) fn nearly_read(&mut self, id: ModelId) {
        let Some(FromDisk { requests, held }) = self.models.get_mut(&id).and_then(|model| model.from_disk.take())
        else {
            return;
        };
        for Waiting { request, function, deadline, form } in requests {
            self.happen(Event::Arrived { request, function, deadline, form });
        }
        // The swap-in that was asked for meanwhile, if there was a lane, holds them now.
        drop(held);
    }

    /// What waits for disks is left to the scheduler, which serves what it has before the end.
    pub(super) fn wait_for_no_disk(&mut self) {
        let waiting = self.models.iter().filter(|(_, model)| model.from_disk.is_some());
        let waiting: Vec<_> = waiting.map(|(id, _)| *id).collect();
        waiting.into_iter().for_each(|id| self.nearly_read(id));
    }

    /// Nobody wants the answer any more.
    pub(super) fn cancelled(&mut self, request: RequestKey) {
        let waits = self.models.values_mut().filter_map(|model| model.from_disk.as_mut()).any(|from_disk| {
            let before = from_disk.requests.len();
            from_disk.requests.retain(|waiting| waiting.request != request);
            from_disk.requests.len() < before
        });
        if waits {
            self.refuse(request, Refusal::Cancelled);
        } else {
            self.happen(Event::Cancelled { request });
        }
    }
}

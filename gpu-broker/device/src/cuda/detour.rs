//! A further way to this GPU: over another one's link to the host, and from there over NVLink.
//!
//! One heavy model comes in nearly half the time when every other group takes the detour; there may be detours over several GPUs. The other GPU lends a few slots
//! of its memory; a piece goes into one, from there to its place, and the slot is used again.

use std::sync::Arc;

use super::{
    driver::{Addresses, Context, Physical, can_reach},
    queue::{Event, Queue},
};
use crate::DeviceError;

/// Size of a slot. Pieces of 16 to 32 MiB were fastest on two H100s.
const SLOT: usize = 16 << 20;
/// Slots: one is filled while another is emptied, and two keep both sides from waiting for each other.
const SLOTS: usize = 4;

struct Slot {
    address: u64,
    /// In the other GPU's context: a piece has arrived in it.
    filled: Event,
    /// In ours: the piece has left it.
    emptied: Event,
    used: bool,
}

/// The way over one other GPU.
pub(super) struct Detour {
    pub(super) ordinal: i32,
    ours: Arc<Context>,
    theirs: Arc<Context>,
    /// On the other GPU: from host memory into slots.
    fetch: Queue,
    /// On ours: from slots to where it belongs.
    pub(super) gather: Queue,
    slots: Vec<Slot>,
    next: usize,
    // Under the slots, so last to go.
    _staging: Staging,
}

struct Staging {
    addresses: Addresses,
    _memory: Physical,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = self.addresses.unmap(0, SLOT * SLOTS) {
            tracing::debug!(%error, "slots of a detour cannot be unmapped");
        }
    }
}

impl Detour {
    /// `None` where the two GPUs do not reach each other.
    pub(super) fn new(ours: &Arc<Context>, ordinal: i32) -> Result<Option<Self>, DeviceError> {
        if !can_reach(ours.device, ordinal)? {
            return Ok(None);
        }
        let theirs = Context::open(ordinal)?;
        let memory = Physical::new(&theirs, SLOT * SLOTS)?;
        let addresses = Addresses::reserve(&theirs, SLOT * SLOTS)?;
        addresses.map(0, &memory, SLOT * SLOTS)?;
        let staging = Staging { addresses, _memory: memory };
        staging.addresses.open(0, SLOT * SLOTS)?;
        staging.addresses.open_to(ours.device, 0, SLOT * SLOTS)?;
        let slot = |number: usize| {
            let address = staging.addresses.base() + (number * SLOT) as u64;
            Ok(Slot { address, filled: Event::new(&theirs)?, emptied: Event::new(ours)?, used: false })
        };
        let slots = (0..SLOTS).map(slot).collect::<Result<_, DeviceError>>()?;
        let (fetch, gather) = (Queue::new(&theirs)?, Queue::new(ours)?);
        ours.enter()?;
        let ours = Arc::clone(ours);
        Ok(Some(Self { ordinal, ours, theirs, fetch, gather, slots, next: 0, _staging: staging }))
    }

    /// Queues a piece over the detour. Our context is current again when this returns.
    ///
    /// # Safety
    /// `len` bytes from `from` must stay readable and unchanged, and `to` mapped, until [`Detour::gather`] is done.
    pub(super) unsafe fn copy_in(&mut self, to: u64, from: *const u8, len: usize) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < len {
            let part = (len - done).min(SLOT);
            // SAFETY: the part lies in what the caller answers for.
            let queued = unsafe { self.copy_part(to + done as u64, from.wrapping_add(done), part) };
            self.ours.enter()?;
            queued?;
            done += part;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Detour::copy_in`]; the part fits in a slot.
    unsafe fn copy_part(&mut self, to: u64, from: *const u8, len: usize) -> Result<(), DeviceError> {
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % SLOTS;
        self.theirs.enter()?;
        if slot.used {
            self.fetch.wait(&slot.emptied)?;
        }
        slot.used = true;
        // SAFETY: the caller's promise; the slot is free by then, and as long as a slot.
        unsafe { self.fetch.copy_in(slot.address, from, len) }?;
        self.fetch.record(&slot.filled)?;
        self.ours.enter()?;
        self.gather.wait(&slot.filled)?;
        // SAFETY: the caller's promise; the slot stays ours until it is emptied.
        unsafe { self.gather.copy_across(to, slot.address, len) }?;
        self.gather.record(&slot.emptied)
    }

    /// Waits for whatever is on the way.
    pub(super) fn settle(&self) -> Result<(), DeviceError> {
        self.theirs.enter()?;
        let fetched = self.fetch.finish(&Event::new(&self.theirs)?);
        self.ours.enter()?;
        fetched.and(self.gather.finish(&Event::new(&self.ours)?))
    }
}

impl Drop for Detour {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            tracing::debug!(%error, "a detour that goes cannot be emptied");
        }
    }
}

//! What a pass has left to give: lanes and links, and for whom they would do.

use crate::{books::Books, ready::Tier, slots::Slot, time::Span};

/// A copy may be asked for while one to the same device ends within this time.
pub(crate) const COPY_ENDS_SOON: Span = Span::micros(500);

/// What there is to give.
#[derive(Clone, Copy)]
pub(crate) struct Means {
    lane: bool,
    link: bool,
    /// No link is in use.
    quiet: bool,
}

impl Means {
    pub(crate) fn of(books: &Books) -> Self {
        let mut means = Self { lane: false, link: false, quiet: true };
        for (place, device) in books.devices.iter().enumerate().filter(|(_, device)| !device.lost) {
            let idle = device.copies.is_empty();
            means.lane |= device.has_idle_lane();
            means.link |= idle || books.links.free_at(place) <= books.now + COPY_ENDS_SOON;
            means.quiet &= idle;
        }
        means
    }

    /// Whether a copy may be asked for somewhere.
    pub(crate) fn link(self) -> bool {
        self.link
    }

    pub(crate) fn any(self) -> bool {
        self.lane || self.link
    }

    /// Whether anything could be done for this function: a lane for what is held, a link for what is not.
    pub(crate) fn suffice(self, books: &Books, tier: Tier, slot: Slot) -> bool {
        let model = books.functions.get(slot).and_then(|function| books.models.get(function.model));
        let Some(model) = model else { return false };
        let link = if tier < Tier::Late { self.link } else { self.quiet };
        if model.stays.is_empty() { link } else { self.lane || (link && tier < Tier::Late) }
    }
}

/// Whether a model is on a device with an idle lane.
pub(crate) fn runs_at_once(books: &Books, slot: Slot) -> bool {
    let model = books.functions.get(slot).and_then(|function| books.models.get(function.model));
    let idle = |device: usize| books.devices.get(device).is_some_and(|on| !on.lost && on.has_idle_lane());
    model.is_some_and(|model| model.stays.iter().any(|stay| idle(stay.device)))
}

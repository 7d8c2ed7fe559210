//! How much more is asked for than can be done, told by how many requests are late; and who and what is given up for it.
//!
//! Where more is asked for than can be done, a policy that serves all that can still be in time serves everything at the last
//! moment: no run has time for others to share it, and whatever takes a little longer than predicted is late. So the more is late,
//! the sooner a request is given up ([`Pressure::margin`]), and those that remain have time. And functions that are too far
//! behind yield to the others ([`Pressure::look`]): rather a few that miss their objectives than all of them, by a little.
//! Where nearly all are in time, neither happens.

use crate::{
    books::Books,
    demand::faded,
    limits::CONTROL_EVERY,
    objective::{Count, Tally},
    ready::Waiting,
    time::{At, Span},
};

/// So many of a thousand requests may be late, as of most functions: all is well.
const LATE_PERMILLE: u64 = 20;
/// What is given up of a deadline, in thousandths, for each of a thousand requests that is late beyond those ...
const MARGIN_PER_LATE: u64 = 8;
/// ... and no more than this.
const MARGIN_MAX_PERMILLE: u64 = 125;
/// Requests that ended so long ago count half.
const FADES: Span = Span::secs(1);
/// One request, of which parts are left later.
const ONE: u64 = 1 << 20;
/// So many requests in time are assumed beside those that were seen: a few that are late say little.
const PRIOR: u64 = 32 * ONE;
/// The range of the threshold between the classes, in thousandths of a request.
const THRESHOLD_MIN: i64 = 10_000;
const THRESHOLD_MAX: i64 = 1_000_000;

/// How many requests are late.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pressure {
    ended: u64,
    late: u64,
    at: At,
    /// Of the high class, since the threshold was looked at.
    high: Count,
    control_at: At,
}

impl Pressure {
    pub(crate) const fn new() -> Self {
        Self { ended: 0, late: 0, at: At::START, high: Count::NONE, control_at: At::START }
    }

    /// Takes in what has become of requests, and moves the threshold between the classes now and then: down while requests of the
    /// high class are late, so that fewer functions are in it, and up while they are in time.
    pub(crate) fn look(&mut self, books: &mut Books) {
        let Tally { all, high } = std::mem::take(&mut books.tally);
        self.high.add_all(high);
        if all.asked > 0 {
            self.learn(books.now, all);
        }
        if books.now < self.control_at {
            return;
        }
        self.control_at = books.now + CONTROL_EVERY;
        let threshold = books.threshold_permille.min(THRESHOLD_MAX);
        let high = std::mem::take(&mut self.high);
        let late = u64::from(high.missed()) * 1000 > u64::from(high.asked) * LATE_PERMILLE;
        books.threshold_permille =
            if late { (threshold / 2).max(THRESHOLD_MIN) } else { (threshold + threshold / 4).min(THRESHOLD_MAX) };
    }

    fn learn(&mut self, now: At, all: Count) {
        let left = |count: u64| faded(count, now - self.at, FADES);
        self.ended = left(self.ended).saturating_add(u64::from(all.asked) * ONE);
        self.late = left(self.late).saturating_add(u64::from(all.missed()) * ONE);
        self.at = now;
    }

    /// How long before its deadline a request must be answered not to be given up.
    pub(crate) fn margin(&self, waiting: Waiting) -> Span {
        let late_permille = self.late.saturating_mul(1000) / self.ended.saturating_add(PRIOR);
        let margin_permille = late_permille.saturating_sub(LATE_PERMILLE) * MARGIN_PER_LATE;
        (waiting.deadline - waiting.arrived).permille(margin_permille.min(MARGIN_MAX_PERMILLE))
    }
}

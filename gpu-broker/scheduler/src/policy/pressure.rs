//! How much more is asked for than can be done, told by how many requests are late; and who and what is given up for it.
//!
//! Where more is asked for than can be done, a policy that serves all that can still be in time serves everything at the last
//! moment: no run has time for others to share it, and whatever takes a little longer than predicted is late. So the more is late,
//! the sooner a request is given up ([`Pressure::margin`]), and those that remain have time. And functions that are too far
//! behind yield to the others ([`Pressure::look`]), the more so the more is late: rather a few that miss their objectives than all
//! of them, by a little. Where nearly all are in time, nothing is given up early, and who is behind comes back.

use crate::{
    books::Books,
    demand::faded,
    limits::CONTROL_EVERY,
    objective::Count,
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
const PRIOR: u64 = 100 * ONE;
/// The range of the threshold between the classes, in thousandths of a request. One request that is late beyond those that may be
/// makes 50 of a p98: a function that is that far behind is never left alone for it.
const THRESHOLD_MIN: i64 = 50_000;
const THRESHOLD_MAX: i64 = 1_000_000;
/// It falls by such a part, soon, before all are too far behind ...
const FALLS_BY: i64 = 4;
/// ... and rises by such a part, slowly: who comes back too early makes the others late.
const RISES_BY: i64 = 32;

/// By so many thousandths of its deadline a function of the low class yields to the others: more than those that can afford misses,
/// and less than it takes to be late wherever somebody else is there. What is a class of its own behind all others never comes back:
/// once behind, a function would have a third of its requests late on a link that is busy for three quarters of the time.
const LOW_YIELDS_PERMILLE: u64 = 500;
/// And by so many more for each of a thousand requests that is late beyond those that may be ...
const LOW_YIELDS_PER_LATE: u64 = 20;
/// ... and no more than this: then it is behind all of the same deadline that can be in time.
const LOW_YIELDS_MAX_PERMILLE: u64 = 2_000;

/// How many requests are late.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pressure {
    ended: u64,
    late: u64,
    at: At,
    control_at: At,
}

impl Pressure {
    pub(crate) const fn new() -> Self {
        Self { ended: 0, late: 0, at: At::START, control_at: At::START }
    }

    /// Takes in what has become of requests, and moves the threshold between the classes now and then: down while requests of the
    /// high class are late, so that fewer functions are in it, and up while they are in time.
    pub(crate) fn look(&mut self, books: &mut Books) {
        let all = std::mem::take(&mut books.tally.all);
        if all != Count::NONE {
            self.learn(books.now, all);
            let more = self.too_late_permille() * LOW_YIELDS_PER_LATE;
            books.low_yields_permille = (LOW_YIELDS_PERMILLE + more).min(LOW_YIELDS_MAX_PERMILLE);
        }
        if books.now < self.control_at {
            return;
        }
        self.control_at = books.now + CONTROL_EVERY;
        let threshold = books.threshold_permille.min(THRESHOLD_MAX);
        let high = std::mem::take(&mut books.tally.high);
        let late = u64::from(high.missed()) * 1000 > u64::from(high.asked) * LATE_PERMILLE;
        books.threshold_permille = if late {
            (threshold - threshold / FALLS_BY).max(THRESHOLD_MIN)
        } else {
            (threshold + threshold / RISES_BY).min(THRESHOLD_MAX)
        };
    }

    fn learn(&mut self, now: At, all: Count) {
        let left = |count: u64| faded(count, now - self.at, FADES);
        self.ended = left(self.ended).saturating_add(u64::from(all.asked) * ONE);
        let asked = left(self.late).saturating_add(u64::from(all.asked) * ONE);
        self.late = asked.saturating_sub(u64::from(all.met) * ONE);
        self.at = now;
    }

    /// How many of a thousand requests are late beyond those that may be.
    fn too_late_permille(&self) -> u64 {
        (self.late.saturating_mul(1000) / self.ended.saturating_add(PRIOR)).saturating_sub(LATE_PERMILLE)
    }

    /// How long before its deadline a request must be answered not to be given up.
    pub(crate) fn margin(&self, waiting: Waiting) -> Span {
        let margin_permille = self.too_late_permille() * MARGIN_PER_LATE;
        (waiting.deadline - waiting.arrived).permille(margin_permille.min(MARGIN_MAX_PERMILLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{event::RequestKey, eviction::Eviction, scheduler::SchedulerConfig};

    /// What is given up of a deadline of 80 ms.
    fn margin(pressure: &Pressure) -> Span {
        let deadline = At::START + Span::millis(80);
        pressure.margin(Waiting { request: RequestKey(1), arrived: At::START, deadline, form: None })
    }

    fn books() -> Books {
        Books::new(SchedulerConfig::default(), Eviction::Regret)
    }

    /// So many requests, of which so many were late, every 10 ms for so long.
    fn pressed(books: &mut Books, pressure: &mut Pressure, (asked, late): (u32, u32), high: bool, ms: u64) {
        for _ in 0..ms / 10 {
            books.now = books.now + Span::millis(10);
            (0..asked).for_each(|nth| books.tally.add(high, nth >= late));
            pressure.look(books);
        }
    }

    #[test]
    fn the_more_is_late_the_sooner_is_given_up_and_nothing_where_nearly_all_is_in_time() {
        let given_up = |late| {
            let (mut books, mut pressure) = (books(), Pressure::new());
            pressed(&mut books, &mut pressure, (100, late), true, 3_000);
            margin(&pressure)
        };
        assert_eq!([0, 1, 2].map(given_up), [Span::ZERO; 3]);
        assert!(given_up(3) > Span::ZERO && given_up(4) > given_up(3));
        assert_eq!([50, 100].map(given_up), [Span::millis(10); 2], "an eighth at most");
    }

    #[test]
    fn who_is_behind_yields_by_half_a_deadline_and_by_more_the_more_is_late() {
        let yields = |late| {
            let (mut books, mut pressure) = (books(), Pressure::new());
            pressed(&mut books, &mut pressure, (100, late), true, 3_000);
            books.low_yields_permille
        };
        assert_eq!([0, 1, 2].map(yields), [LOW_YIELDS_PERMILLE; 3]);
        assert!(yields(3) > LOW_YIELDS_PERMILLE && yields(4) > yields(3));
        assert_eq!([20, 100].map(yields), [LOW_YIELDS_MAX_PERMILLE; 2]);
    }

    #[test]
    fn a_few_late_requests_say_little_and_what_is_over_is_forgotten() {
        let (mut books, mut pressure) = (books(), Pressure::new());
        books.tally.add(true, false);
        pressure.look(&mut books);
        assert_eq!(margin(&pressure), Span::ZERO);
        pressed(&mut books, &mut pressure, (100, 100), true, 1_000);
        assert_eq!(margin(&pressure), Span::millis(10));
        pressed(&mut books, &mut pressure, (100, 0), true, 8_000);
        assert_eq!(margin(&pressure), Span::ZERO);
    }

    /// Its model takes most of its deadline: each is given up for the margin, and in time all the same, since nothing else is there.
    #[test]
    fn what_is_given_up_and_in_time_all_the_same_does_not_keep_the_margin() {
        let (mut books, mut pressure) = (books(), Pressure::new());
        pressed(&mut books, &mut pressure, (100, 100), true, 1_000);
        for _ in 0..1_500 {
            books.tally.add(true, false);
            pressed(&mut books, &mut pressure, (0, 0), true, 10);
            books.tally.amend(true);
        }
        assert_eq!(margin(&pressure), Span::ZERO);
    }

    #[test]
    fn the_threshold_falls_while_the_high_class_is_late_and_rises_slowly_whatever_the_low_one_is() {
        let (mut books, mut pressure) = (books(), Pressure::new());
        pressed(&mut books, &mut pressure, (100, 10), true, 10_000);
        assert_eq!(books.threshold_permille, THRESHOLD_MIN);
        pressed(&mut books, &mut pressure, (100, 100), false, 2_000);
        let risen = books.threshold_permille;
        assert!((THRESHOLD_MIN + 1..2 * THRESHOLD_MIN).contains(&risen), "{risen}");
        pressed(&mut books, &mut pressure, (100, 0), true, 40_000);
        assert_eq!(books.threshold_permille, THRESHOLD_MAX);
    }
}

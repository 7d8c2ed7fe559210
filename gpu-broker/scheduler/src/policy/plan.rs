//! The near future of the lanes, as one pass of the policy has promised them so far.
//!
//! A pass looks at requests from the most urgent on. What it cannot start yet it enters here, so that less urgent
//! requests see the lane as taken. A run that waits for its weights leaves a hole before it: what ends in time may use it.

use crate::{
    books::Books,
    time::{At, Span},
};

/// One lane: free until the hole ends, then promised until `after`.
#[derive(Clone, Copy, Debug)]
struct Lane {
    free_at: At,
    hole_until: At,
    after: At,
}

/// One device in this pass.
#[derive(Clone, Debug, Default)]
struct Outlook {
    lanes: Vec<Lane>,
    /// A more urgent request waits for this device's link.
    link_promised: bool,
}

/// All devices in this pass. Kept between passes for its memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    devices: Vec<Outlook>,
}

/// A place on a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    pub(crate) lane: usize,
    pub(crate) start: At,
}

impl Plan {
    /// Starts from what runs now.
    pub(crate) fn begin(&mut self, books: &Books) {
        self.devices.resize_with(books.devices.len(), Outlook::default);
        for (outlook, device) in self.devices.iter_mut().zip(&books.devices) {
            outlook.link_promised = false;
            outlook.lanes.clear();
            if device.lost {
                continue;
            }
            outlook.lanes.extend(device.lanes.iter().map(|lane| {
                let free_at = lane.as_ref().map_or(books.now, |running| overdue(running.ends, books.now));
                Lane { free_at, hole_until: At::NEVER, after: free_at }
            }));
        }
    }

    /// The earliest start, not before `from`, of a run of that length.
    pub(crate) fn opening(&self, device: usize, from: At, run: Span) -> Option<Opening> {
        let lanes = self.devices.get(device)?.lanes.iter().enumerate();
        let openings = lanes.map(|(lane, promised)| {
            let start = from.max(promised.free_at);
            let fits = start + run <= promised.hole_until;
            Opening { lane, start: if fits { start } else { from.max(promised.after) } }
        });
        openings.min_by_key(|opening| (opening.start, opening.lane))
    }

    /// Promises a lane; a start that lies ahead leaves a hole, and `slack` says how far it could be put off.
    pub(crate) fn promise(&mut self, device: usize, opening: Opening, ends: At, slack: Span) {
        let Some(lane) = self.devices.get_mut(device).and_then(|outlook| outlook.lanes.get_mut(opening.lane)) else {
            return;
        };
        if opening.start >= lane.after && lane.hole_until == At::NEVER && opening.start > lane.free_at {
            lane.hole_until = opening.start + slack;
            lane.after = ends;
        } else if opening.start < lane.hole_until && lane.hole_until != At::NEVER {
            lane.free_at = ends;
        } else {
            lane.after = lane.after.max(ends);
            if lane.hole_until == At::NEVER {
                lane.free_at = lane.after;
            }
        }
    }

    /// Nothing starts on this device in this pass.
    pub(crate) fn close(&mut self, device: usize) {
        if let Some(outlook) = self.devices.get_mut(device) {
            outlook.link_promised = true;
            let never = Lane { free_at: At::NEVER, hole_until: At::NEVER, after: At::NEVER };
            outlook.lanes.fill(never);
        }
    }

    pub(crate) fn promise_link(&mut self, device: usize) {
        if let Some(outlook) = self.devices.get_mut(device) {
            outlook.link_promised = true;
        }
    }

    pub(crate) fn link_is_promised(&self, device: usize) -> bool {
        self.devices.get(device).is_none_or(|outlook| outlook.link_promised)
    }
}

/// What should have ended by now is expected the later the longer it is overdue.
fn overdue(ends: At, now: At) -> At {
    if ends > now { ends } else { now + (now - ends) / 4 + Span::micros(20) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> At {
        At::START + Span::millis(ms)
    }

    fn plan() -> Plan {
        let lane = Lane { free_at: at(0), hole_until: At::NEVER, after: at(0) };
        Plan { devices: vec![Outlook { lanes: vec![lane], link_promised: false }] }
    }

    #[test]
    fn a_hole_before_a_promised_run_is_used_by_what_ends_in_time() {
        let mut plan = plan();
        let later = plan.opening(0, at(100), Span::millis(40)).expect("there is a lane");
        plan.promise(0, later, at(140), Span::ZERO);
        let short = plan.opening(0, at(0), Span::millis(30)).expect("there is a lane");
        assert_eq!(short.start, at(0));
        plan.promise(0, short, at(30), Span::ZERO);
        let long = plan.opening(0, at(0), Span::millis(80)).expect("there is a lane");
        assert_eq!(long.start, at(140), "30 + 80 would delay the promised run");
        assert_eq!(plan.opening(0, at(0), Span::millis(70)).map(|o| o.start), Some(at(30)));
    }

    #[test]
    fn promised_runs_queue() {
        let mut plan = plan();
        let first = plan.opening(0, at(0), Span::millis(10)).expect("there is a lane");
        plan.promise(0, first, at(10), Span::ZERO);
        assert_eq!(plan.opening(0, at(0), Span::millis(10)).map(|o| o.start), Some(at(10)));
    }
}

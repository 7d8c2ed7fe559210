//! The life of a range, as a state machine without memory, threads or clocks.

use faaswap_protocol::Bytes;

use crate::{DeviceError, Group};

/// Where a range stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Addresses only; touching them faults.
    Out,
    /// A swap-in waits for the link.
    Queued,
    /// Groups arrive.
    Copying,
    /// All groups are there.
    Resident,
    /// A swap-out waits for the link; a swap-in before it may still be queued or copying.
    Leaving,
}

/// What happens to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A swap-in is asked for.
    AskIn,
    /// A swap-out is asked for.
    AskOut,
    /// The link begins a swap-in.
    Begin,
    /// The link ended a swap-in with all groups there.
    Arrive,
    /// The link ended a swap-in with nothing there.
    Fail,
    /// The link ended a swap-out.
    Leave,
}

impl State {
    /// The state afterwards, or `None` where this cannot happen now.
    pub(crate) fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (Self::Out, Step::AskIn) => Some(Self::Queued),
            (Self::Queued, Step::Begin) => Some(Self::Copying),
            (Self::Copying, Step::Arrive) => Some(Self::Resident),
            (Self::Copying, Step::Fail) => Some(Self::Out),
            // The link does swaps in the order of asking, so a swap-out may be asked for before the swap-in is done.
            (Self::Queued | Self::Copying | Self::Resident, Step::AskOut) => Some(Self::Leaving),
            (Self::Leaving, Step::Begin | Step::Arrive | Step::Fail) => Some(Self::Leaving),
            (Self::Leaving, Step::Leave) => Some(Self::Out),
            (Self::Out, Step::AskOut | Step::Begin | Step::Arrive | Step::Fail | Step::Leave)
            | (Self::Queued, Step::AskIn | Step::Arrive | Step::Fail | Step::Leave)
            | (Self::Copying, Step::AskIn | Step::Begin | Step::Leave)
            | (Self::Resident, Step::AskIn | Step::Begin | Step::Arrive | Step::Fail | Step::Leave)
            | (Self::Leaving, Step::AskIn | Step::AskOut) => None,
        }
    }

    /// For error messages.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Out => "swapped out",
            Self::Queued => "waiting to be swapped in",
            Self::Copying => "being swapped in",
            Self::Resident => "swapped in",
            Self::Leaving => "being swapped out",
        }
    }
}

/// Size of the addresses for weights of this size: whole chunks, and at least one, so that every range has an address.
pub(crate) fn addresses(weights: Bytes, chunk: Bytes) -> Option<Bytes> {
    weights.checked_round_up(chunk).map(|len| len.max(chunk))
}

/// Most groups of one model.
pub const GROUPS_MAX: usize = 1 << 16;

/// Sees to it that groups follow each other without gaps and are the whole of the weights.
pub(crate) fn count_groups(groups: &[Group], weights: Bytes) -> Result<u32, DeviceError> {
    let mut end = 0;
    for group in groups {
        if group.offset != end {
            return Err(DeviceError::Invalid("groups must follow each other without gaps, from the start"));
        }
        end = end.checked_add(group.len).ok_or(DeviceError::Invalid("the groups are larger than can be"))?;
    }
    if end != weights.get() {
        return Err(DeviceError::Invalid("the groups do not cover the weights"));
    }
    let count = u32::try_from(groups.len()).ok().filter(|_| groups.len() <= GROUPS_MAX);
    count.ok_or(DeviceError::Invalid("there are more groups than a model can have"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs every step sequence of the link and its callers and sees that no path gets stuck.
    #[test]
    fn a_swap_out_asked_for_at_any_time_ends_with_the_range_out() {
        use Step::{Arrive, AskIn, AskOut, Begin, Fail, Leave};
        for path in [
            &[AskIn, AskOut, Begin, Arrive, Leave][..],
            &[AskIn, AskOut, Begin, Fail, Leave],
            &[AskIn, Begin, AskOut, Arrive, Leave],
            &[AskIn, Begin, AskOut, Fail, Leave],
            &[AskIn, Begin, Arrive, AskOut, Leave],
            &[AskIn, Begin, Fail],
        ] {
            let end = path.iter().try_fold(State::Out, |state, &step| state.after(step));
            assert_eq!(end, Some(State::Out), "{path:?}");
        }
    }

    #[test]
    fn only_a_range_that_is_out_can_be_swapped_in() {
        for state in [State::Queued, State::Copying, State::Resident, State::Leaving] {
            assert_eq!(state.after(Step::AskIn), None, "{state:?}");
        }
        assert_eq!(State::Leaving.after(Step::AskOut), None);
        assert_eq!(State::Out.after(Step::AskOut), None);
    }
}

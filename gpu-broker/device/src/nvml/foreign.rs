//! Which processes on a GPU are others': not this one, and not the children in which it prepares models.

use std::{collections::BTreeMap, fs};

use faaswap_protocol::Bytes;

use super::observation::Foreign;

/// A process on a GPU, and its memory there where the driver tells.
pub(super) type OnGpu = (u32, Option<u64>);

/// Sums up who is not ours. A process that the driver lists twice, as computing and as drawing, counts once.
pub(super) fn count(found: &[OnGpu], is_ours: impl Fn(u32) -> bool) -> Foreign {
    let mut by_pid: BTreeMap<u32, Option<u64>> = BTreeMap::new();
    for (pid, bytes) in found {
        let most = by_pid.entry(*pid).or_default();
        *most = (*most).max(*bytes);
    }
    let others: Vec<_> = by_pid.iter().filter(|(pid, _)| !is_ours(**pid)).map(|(_, bytes)| *bytes).collect();
    Foreign {
        processes: others.len(),
        bytes: others.iter().try_fold(0_u64, |sum, bytes| Some(sum.saturating_add((*bytes)?))).map(Bytes::new),
        found_ours: others.len() < by_pid.len(),
    }
}

/// Whether this is our process or a child of it.
pub(super) fn is_ours(pid: u32) -> bool {
    let ours = std::process::id();
    let parent = || parent(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
    pid == ours || parent() == Some(ours)
}

/// The parent in a line of `/proc/…/stat`. The second field is the program's name, which may hold anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_counts_once_with_its_larger_figure_and_ours_do_not() {
        let found = [(7, Some(100)), (9, Some(30)), (9, Some(40)), (8, Some(5))];
        let foreign = count(&found, |pid| pid == 7);
        assert_eq!(foreign, Foreign { processes: 2, bytes: Some(Bytes::new(45)), found_ours: true });
        let none = count(&[], |_| true);
        assert_eq!(none, Foreign { processes: 0, bytes: Some(Bytes::ZERO), found_ours: false });
    }

    #[test]
    fn what_the_driver_does_not_tell_is_not_counted_as_nothing() {
        let foreign = count(&[(8, Some(5)), (9, None)], |_| false);
        assert_eq!(foreign, Foreign { processes: 2, bytes: None, found_ours: false });
        let ours_alone = count(&[(8, None)], |_| true);
        assert_eq!(ours_alone.bytes, Some(Bytes::ZERO), "what is ours need not be known");
    }

    #[test]
    fn a_parent_is_found_behind_any_name() {
        assert_eq!(parent("12 (cat) S 34 12 12 0"), Some(34));
        assert_eq!(parent("12 (a) R 99 (b) S 34 12 12 0"), Some(34), "a name with spaces and brackets");
        assert_eq!(parent("nonsense"), None);
    }

    #[test]
    fn our_children_are_ours_and_our_parent_is_not() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        assert!(is_ours(std::process::id()) && is_ours(child.id()));
        assert!(!is_ours(1));
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}

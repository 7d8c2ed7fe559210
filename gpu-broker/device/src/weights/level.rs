//! How far weights are filled, and who waits for more.

use std::{
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::DeviceError;

/// How often those who wait for weights look whether there is still a reason to.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The watermark: bytes below it are there and do not change any more.
#[derive(Debug, Default)]
pub(super) struct Level {
    until: AtomicUsize,
    failed: Mutex<Option<DeviceError>>,
    news: Condvar,
}

impl Level {
    pub(super) fn full(len: usize) -> Self {
        Self { until: AtomicUsize::new(len), ..Self::default() }
    }

    /// What was written below the mark is seen by whoever sees the mark.
    pub(super) fn until(&self) -> usize {
        self.until.load(Ordering::Acquire)
    }

    /// Raises the mark.
    pub(super) fn raise(&self, until: usize) {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        self.until.fetch_max(until, Ordering::Release);
        drop(failed);
        self.news.notify_all();
    }

    /// The rest will not come. The first reason stays.
    pub(super) fn fail(&self, why: DeviceError) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.news.notify_all();
    }

    /// Why the rest will not come.
    pub(super) fn failed(&self) -> Option<DeviceError> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the mark is there; false where it is not yet after this time. What is below the mark stays good when
    /// the rest fails.
    pub(super) fn wait(&self, end: usize, most: Duration) -> Result<bool, DeviceError> {
        if self.until() >= end {
            return Ok(true);
        }
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |failed: &mut Option<DeviceError>| failed.is_none() && self.until() < end;
        let waited = self.news.wait_timeout_while(failed, most, waiting);
        let (failed, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match (self.until() >= end, failed.as_ref()) {
            (true, _) => Ok(true),
            (false, Some(why)) => Err(why.clone()),
            (false, None) => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_waiter_goes_on_when_the_mark_reaches_it_and_not_before() {
        let level = Level::default();
        assert_eq!(level.wait(0, Duration::ZERO), Ok(true), "nothing is there from the start");
        assert_eq!(level.wait(5, Duration::ZERO), Ok(false));
        thread::scope(|scope| {
            let waiter = scope.spawn(|| level.wait(5, LONG));
            level.raise(4);
            assert_eq!(level.wait(5, Duration::ZERO), Ok(false));
            level.raise(6);
            assert_eq!(waiter.join().ok(), Some(Ok(true)));
        });
        level.raise(3);
        assert_eq!(level.until(), 6, "it never falls");
    }

    #[test]
    fn a_failure_wakes_those_who_wait_for_the_rest_and_leaves_what_is_there() {
        let level = Level::default();
        level.raise(4);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| level.wait(5, LONG));
            level.fail(DeviceError::Invalid("first"));
            assert_eq!(waiter.join().ok(), Some(Err(DeviceError::Invalid("first"))));
        });
        level.fail(DeviceError::Invalid("second"));
        assert_eq!(level.failed(), Some(DeviceError::Invalid("first")));
        assert_eq!(level.wait(4, Duration::ZERO), Ok(true));
    }
}

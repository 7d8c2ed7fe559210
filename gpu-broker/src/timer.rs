//! A timer that rings on time. The runtime's own rounds up to milliseconds: a link that has nothing to do so long loses as much as a small
//! model's copy takes.

use std::{
    io,
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver};

/// A timer for one who waits. To the runtime its descriptor is a pipe's: to be read when there is something, which is each time it rings.
#[derive(Debug)]
pub(crate) struct Timer(Receiver);

impl Timer {
    /// To be called in the runtime that will wait for it.
    pub(crate) fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self(Receiver::from_owned_fd_unchecked(timer)?))
    }

    /// Sleeps until this moment. What was waited for before and is not over is forgotten.
    pub(crate) async fn until(&mut self, at: Instant) -> io::Result<()> {
        // Nothing at all would be no moment.
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let once = Itimerspec { it_interval: Timespec::default(), it_value: timespec(left) };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        let mut rings = [0; 8];
        self.0.read_exact(&mut rings).await.map(drop)
    }
}

fn timespec(span: Duration) -> Timespec {
    let seconds = i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec: seconds, tv_nsec: span.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn it_rings_when_it_is_time_and_never_before() {
        let mut timer = Timer::new().expect("a timer");
        for micros in [300, 0, 2_500] {
            let at = Instant::now() + Duration::from_micros(micros);
            timer.until(at).await.expect("it rings");
            assert!(Instant::now() >= at);
        }
        timer.until(Instant::now() - Duration::from_secs(1)).await.expect("it rings for what is over");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_moment_that_nobody_waits_for_any_more_is_forgotten() {
        let mut timer = Timer::new().expect("a timer");
        let first = Instant::now() + Duration::from_micros(200);
        tokio::select! {
            biased;
            rung = timer.until(first) => panic!("{rung:?} before it was waited for"),
            () = std::future::ready(()) => {}
        }
        // It has rung meanwhile, and nobody has looked.
        std::thread::sleep(Duration::from_millis(1));
        let second = Instant::now() + Duration::from_millis(3);
        timer.until(second).await.expect("it rings");
        assert!(Instant::now() >= second);
    }
}

//! A thread that a model's session is made and captured on.
//!
//! What libraries keep for the thread that runs a session goes with that thread: ONNX Runtime keeps its plans for attention so, and with
//! them the kernels that cuDNN has made. So a model that is bound to a GPU by a session is bound on a thread of its own, which
//! stays as long as anybody may run such kernels.

use std::{
    fmt,
    sync::{Arc, OnceLock, mpsc},
    thread::{self, JoinHandle},
};

use faaswap_device::Device;

use crate::EngineError;

/// As much as a process's first thread has: cuDNN compiles kernels on it.
const STACK_BYTES: usize = 8 << 20;

/// A thread that does nothing any more. It ends when this goes.
pub(super) struct Home {
    device: Arc<dyn Device>,
    /// The thread ends when this has gone.
    stays: Option<mpsc::Sender<()>>,
    thread: OnceLock<JoinHandle<()>>,
}

impl Home {
    /// Does work on a thread of its own, which stays as long as anybody has what the work is told.
    pub(super) fn run<T: Send + 'static>(
        device: &Arc<dyn Device>,
        work: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        let (stays, until) = mpsc::channel();
        let home = Arc::new(Self { device: Arc::clone(device), stays: Some(stays), thread: OnceLock::new() });
        let (tell, told) = mpsc::channel();
        let there = Arc::clone(&home);
        let thread = thread::Builder::new().name("bind".to_owned()).stack_size(STACK_BYTES).spawn(move || {
            let done = work(&there);
            // The last one must not go on this thread, which it waits for.
            drop(there);
            let _told = tell.send(done);
            let _ended = until.recv();
        });
        let thread =
            thread.map_err(|error| EngineError::Ort(format!("a model needs a thread to be bound: {error}")))?;
        home.thread.get_or_init(|| thread);
        told.recv().map_err(|_| EngineError::Ort("the thread that bound a model has panicked".to_owned()))
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Home").finish_non_exhaustive()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let (stays, thread) = (self.stays.take(), self.thread.take());
        let end = || {
            drop(stays);
            // One that has panicked has said so.
            thread.map(JoinHandle::join)
        };
        // What goes with it may wait for the whole device.
        match self.device.as_cuda() {
            Some(cuda) => drop(cuda.beside_captures(end)),
            None => drop(end()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::atomic::{AtomicUsize, Ordering};

    use faaswap_device::host::{HostConfig, HostDevice};
    use faaswap_protocol::Bytes;

    use super::*;

    static ENDED: AtomicUsize = AtomicUsize::new(0);

    struct Kept;

    impl Drop for Kept {
        fn drop(&mut self) {
            ENDED.fetch_add(1, Ordering::SeqCst);
        }
    }

    thread_local! {
        static KEPT: Kept = const { Kept };
    }

    #[test]
    fn what_a_thread_keeps_stays_as_long_as_its_home() {
        let device: Arc<dyn Device> = HostDevice::new(HostConfig::new("home", Bytes::mib(64))).unwrap();
        let caller = thread::current().id();
        let keep = |home: &Arc<Home>| {
            KEPT.with(|_| ());
            (Arc::clone(home), thread::current().id())
        };
        let (home, there) = Home::run(&device, keep).unwrap();
        assert_ne!(there, caller);
        assert_eq!(ENDED.load(Ordering::SeqCst), 0);
        let other = Arc::clone(&home);
        drop(home);
        assert_eq!(ENDED.load(Ordering::SeqCst), 0);
        drop(other);
        assert_eq!(ENDED.load(Ordering::SeqCst), 1, "it has ended, not only been told to");
        // Nobody keeps this one.
        Home::run(&device, |_| KEPT.with(|_| ())).unwrap();
        assert_eq!(ENDED.load(Ordering::SeqCst), 2);
        let broken: Result<(), _> = Home::run(&device, |_| panic!("as meant"));
        assert!(broken.is_err());
    }
}

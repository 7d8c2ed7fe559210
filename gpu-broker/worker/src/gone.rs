//! What has gone, and takes milliseconds to take down that nobody shall wait for: sessions, programs, mappings.

use std::{any::Any, io, sync::mpsc, thread};

/// A thread that takes things down, one after the other: drivers and runtimes are seldom tried with many at once. What waits is at
/// most what was bound.
#[derive(Debug)]
pub struct Gone(mpsc::Sender<Box<dyn Any + Send>>);

impl Gone {
    /// Starts the thread, which ends with this.
    pub fn start() -> io::Result<Self> {
        let (gone, queue) = mpsc::channel::<Box<dyn Any + Send>>();
        thread::Builder::new().name("gone".to_owned()).spawn(move || queue.into_iter().for_each(drop))?;
        Ok(Self(gone))
    }

    /// Returns at once.
    pub fn take_down(&self, what: impl Any + Send) {
        // Without the thread it goes here.
        drop(self.0.send(Box::new(what)));
    }
}

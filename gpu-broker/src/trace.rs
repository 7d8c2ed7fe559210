//! Records what the scheduler hears and answers, so that an incident can be replayed: `faaswap-broker replay`.
//!
//! The loop hands each step over and never waits for a disk: a thread of its own looks for steps now and then and writes
//! them. A trace is complete up to its end or ends with the reason why there is no more; none has a gap. It replays from
//! its beginning only, so one that has grown too large ends rather than losing its beginning.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel},
    },
    thread,
};

use faaswap_protocol::Bytes;
use faaswap_scheduler::{
    Action, Event, Moment, SchedulerConfig,
    trace::{Ending, Named, Writer},
};

use crate::limits::{TRACE_ENDED_WITHIN, TRACE_QUEUED_MAX, TRACE_WRITTEN_BYTES, TRACE_WRITTEN_EVERY};

/// One thing to write down.
#[derive(Debug)]
enum Entry {
    Step { now: Moment, event: Event, actions: Vec<Action> },
    Name { of: Named, id: u64, name: String },
}

/// The loop's end of a trace, if one is recorded.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    queue: SyncSender<Entry>,
    /// Whether entries came faster than they were written: the trace ends there.
    behind: Arc<AtomicBool>,
    ended: Receiver<()>,
}

impl Trace {
    /// Begins a trace in this file, of at most so many bytes. One that is there already is kept beside it, with `.1`
    /// behind its name.
    pub(crate) fn begin(path: &Path, max: Bytes, config: &SchedulerConfig) -> io::Result<Self> {
        match fs::rename(path, before(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let file = File::create_new(path)?;
        let (queue, entries) = sync_channel(TRACE_QUEUED_MAX);
        let (end, ended) = sync_channel(1);
        let behind = Arc::new(AtomicBool::new(false));
        let mut text = String::new();
        let writer = Writer::begin(config, &mut text);
        let left = max.get().saturating_sub(text.len() as u64);
        let mut scribe = Scribe { file, writer, text, left, behind: Arc::clone(&behind), path: path.to_owned() };
        thread::Builder::new().name("trace".to_owned()).spawn(move || {
            scribe.write_all(&entries);
            // Whoever waits for the end may have stopped to.
            let _ = end.send(());
        })?;
        tracing::info!(trace = %path.display(), %max, "the scheduler's events and actions are recorded");
        Ok(Self { open: Some(Open { queue, behind, ended }) })
    }

    /// Records a step.
    pub(crate) fn step(&mut self, now: Moment, event: Event, actions: &[Action]) {
        if self.open.is_some() {
            self.hand_over(Entry::Step { now, event, actions: actions.to_vec() });
        }
    }

    /// Records what people call a thing.
    pub(crate) fn name(&mut self, of: Named, id: impl Into<u64>, name: &str) {
        if self.open.is_some() {
            self.hand_over(Entry::Name { of, id: id.into(), name: name.to_owned() });
        }
    }

    /// Ends the trace, and waits a while until it is written.
    pub(crate) fn end(&mut self) {
        let Some(Open { queue, ended, .. }) = self.open.take() else { return };
        drop(queue);
        if ended.recv_timeout(TRACE_ENDED_WITHIN).is_err() {
            tracing::warn!(within = ?TRACE_ENDED_WITHIN, "the end of the trace was not written");
        }
    }

    fn hand_over(&mut self, entry: Entry) {
        let Some(open) = &self.open else { return };
        match open.queue.try_send(entry) {
            Ok(()) => {}
            Err(refused) => {
                if matches!(refused, TrySendError::Full(_)) {
                    open.behind.store(true, Ordering::Release);
                }
                // Ended either way: a trace with a gap would be worth nothing. Its thread says why.
                self.open = None;
            }
        }
    }
}

/// Where the trace before this one is kept.
fn before(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// The thread that writes.
struct Scribe {
    file: File,
    writer: Writer,
    /// Written, but not yet to the file.
    text: String,
    /// Bytes that the trace may still take.
    left: u64,
    behind: Arc<AtomicBool>,
    path: PathBuf,
}

impl Scribe {
    fn write_all(&mut self, entries: &Receiver<Entry>) {
        let ending = match self.write_entries(entries) {
            Ok(ending) => ending,
            Err(error) => {
                tracing::error!(%error, trace = %self.path.display(), "the trace could not be written: it ends here");
                // What stands there may end in the middle of a line; a reader knows that.
                return;
            }
        };
        self.writer.end(&mut self.text, ending);
        let written = self.flush();
        match ending {
            Ending::Stopped => {}
            Ending::Full | Ending::Behind | Ending::Failed => {
                tracing::warn!(trace = %self.path.display(), %ending, "the trace ends here, the broker goes on");
            }
        }
        if let Err(error) = written {
            tracing::error!(%error, trace = %self.path.display(), "the end of the trace could not be written");
        }
    }

    fn write_entries(&mut self, entries: &Receiver<Entry>) -> io::Result<Ending> {
        loop {
            match entries.try_recv() {
                Ok(entry) => {
                    if !self.note(entry) {
                        return Ok(Ending::Full);
                    }
                    if self.text.len() >= TRACE_WRITTEN_BYTES {
                        self.flush()?;
                    }
                }
                Err(TryRecvError::Disconnected) if self.behind.load(Ordering::Acquire) => return Ok(Ending::Behind),
                Err(TryRecvError::Disconnected) => return Ok(Ending::Stopped),
                Err(TryRecvError::Empty) => {
                    self.flush()?;
                    // Nobody wakes this thread: that would cost the loop more than what it hands over.
                    thread::sleep(TRACE_WRITTEN_EVERY);
                }
            }
        }
    }

    /// Writes an entry down, where there is room for it.
    fn note(&mut self, entry: Entry) -> bool {
        let (start, writer) = (self.text.len(), self.writer.clone());
        match entry {
            Entry::Step { now, event, actions } => self.writer.step(&mut self.text, now, &event, &actions),
            Entry::Name { of, id, name } => self.writer.name(&mut self.text, of, id, &name),
        }
        let taken = (self.text.len() - start) as u64;
        match self.left.checked_sub(taken) {
            Some(left) => self.left = left,
            None => {
                self.text.truncate(start);
                self.writer = writer;
                return false;
            }
        }
        true
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(self.text.as_bytes())?;
        self.text.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use faaswap_scheduler::DeviceId;

    use super::*;
    use crate::replay::{Replayed, replay};

    fn event(n: u16) -> Event {
        Event::DeviceLost { device: DeviceId(n) }
    }

    fn record(max: Bytes, steps: u16) -> (tempfile::TempDir, Replayed) {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("trace");
        let mut trace = Trace::begin(&path, max, &SchedulerConfig::default()).expect("it begins");
        for n in 0..steps {
            trace.step(Moment(Duration::from_micros(n.into())), event(n), &[]);
        }
        trace.end();
        let replayed = replay(&path).expect("it is a trace");
        (dir, replayed)
    }

    #[test]
    fn a_trace_that_has_its_size_ends_with_the_reason_and_replays_up_to_there() {
        let (dir, replayed) = record(Bytes::kib(4), 1000);
        assert_eq!(replayed.ending, Some(Ending::Full));
        assert!(replayed.is_same() && replayed.events > 0 && replayed.events < 1000, "{replayed}");
        let size = fs::metadata(dir.path().join("trace")).expect("it is there").len();
        assert!(size <= 4096 + 64, "{size}");
        let (_dir, whole) = record(Bytes::mib(1), 1000);
        assert_eq!((whole.ending, whole.events), (Some(Ending::Stopped), 1000));
    }

    #[test]
    fn a_trace_that_cannot_keep_up_ends_where_it_fell_behind_and_the_loop_goes_on() {
        let (queue, entries) = sync_channel(3);
        let behind = Arc::new(AtomicBool::new(false));
        let (_end, ended) = sync_channel(1);
        let mut trace = Trace { open: Some(Open { queue, behind: Arc::clone(&behind), ended }) };
        for n in 0..10 {
            trace.step(Moment::default(), event(n), &[]);
        }
        assert!(trace.open.is_none(), "nothing after a gap");
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("trace");
        let mut text = String::new();
        let writer = Writer::begin(&SchedulerConfig::default(), &mut text);
        let file = File::create_new(&path).expect("a file");
        let left = 1 << 20;
        Scribe { file, writer, text, left, behind, path: path.clone() }.write_all(&entries);
        let replayed = replay(&path).expect("it is a trace");
        assert_eq!((replayed.events, replayed.ending), (3, Some(Ending::Behind)));
    }

    #[test]
    fn the_trace_of_the_process_before_is_kept() {
        let (dir, _) = record(Bytes::mib(1), 5);
        let path = dir.path().join("trace");
        Trace::begin(&path, Bytes::mib(1), &SchedulerConfig::default()).expect("it begins").end();
        let events = |path: &Path| replay(path).expect("it is a trace").events;
        assert_eq!((events(&before(&path)), events(&path)), (5, 0));
    }
}

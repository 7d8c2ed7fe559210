//! Turns: so many may work at a time, and of those who wait the most wanted goes first.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
};

use tokio::sync::oneshot;

/// How much work is wanted, which may grow while it waits.
#[derive(Debug)]
pub(crate) struct Wanted(AtomicU8);

/// Somebody cannot go on without it.
const NOW: u8 = 0;
/// Somebody has asked for it.
const NEXT: u8 = 1;
/// It can wait until nothing else is to do.
const LATER: u8 = 2;

impl Wanted {
    /// Work that somebody has asked for.
    pub(crate) fn next() -> Arc<Self> {
        Arc::new(Self(AtomicU8::new(NEXT)))
    }

    /// Work that can wait.
    pub(crate) fn later() -> Arc<Self> {
        Arc::new(Self(AtomicU8::new(LATER)))
    }

    /// Somebody waits for it now.
    pub(crate) fn hurry(&self) {
        self.0.store(NOW, Ordering::Relaxed);
    }
}

/// Gives out turns.
#[derive(Clone, Debug)]
pub(crate) struct Turns(Arc<Mutex<Books>>);

#[derive(Debug)]
struct Books {
    free: usize,
    /// In the order of coming; as many as there are models that are loaded or bound.
    waiting: VecDeque<(Arc<Wanted>, oneshot::Sender<Turn>)>,
}

/// The right to work, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Option<Turns>);

impl Turns {
    /// So many at a time.
    pub(crate) fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(Books { free: count, waiting: VecDeque::new() })))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn. May be cancelled.
    pub(crate) async fn take(&self, wanted: &Arc<Wanted>) -> Turn {
        let comes = {
            let mut books = self.books();
            if let Some(left) = books.free.checked_sub(1) {
                books.free = left;
                return Turn(Some(self.clone()));
            }
            let (go, comes) = oneshot::channel();
            books.waiting.push_back((Arc::clone(wanted), go));
            comes
        };
        // Whoever waits is in the books until a turn is sent, and the books outlive this.
        comes.await.unwrap_or(Turn(None))
    }

    /// The one that is wanted most, of those the first.
    fn most_wanted(&self) -> Option<oneshot::Sender<Turn>> {
        let mut books = self.books();
        let all = books.waiting.iter().enumerate();
        let best = all.min_by_key(|(_, (wanted, _))| wanted.0.load(Ordering::Relaxed)).map(|(at, _)| at);
        let best = best.and_then(|at| books.waiting.remove(at)).map(|(_, go)| go);
        if best.is_none() {
            books.free += 1;
        }
        best
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.0.take() else { return };
        while let Some(go) = turns.most_wanted() {
            match go.send(Self(Some(turns.clone()))) {
                Ok(()) => return,
                // It waits no more. What comes back is this turn still.
                Err(mut unused) => unused.0 = None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    /// Begins to wait; whoever gets the turn says its name.
    fn wait(turns: &Turns, wanted: &Arc<Wanted>, name: &'static str) -> tokio::task::JoinHandle<(Turn, &'static str)> {
        let (turns, wanted) = (turns.clone(), Arc::clone(wanted));
        tokio::spawn(async move { (turns.take(&wanted).await, name) })
    }

    #[tokio::test]
    async fn the_most_wanted_goes_first_and_of_those_the_first_that_came() {
        let turns = Turns::new(1);
        let first = turns.take(&Wanted::next()).await;
        let hurried = Wanted::next();
        let all = [
            wait(&turns, &Wanted::later(), "later"),
            wait(&turns, &Wanted::next(), "next"),
            wait(&turns, &Wanted::next(), "next but one"),
            wait(&turns, &hurried, "now"),
        ];
        tokio::task::yield_now().await;
        assert_eq!(turns.books().waiting.len(), all.len());
        hurried.hurry();
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let all = all.map(|one| {
            let tell = tell.clone();
            tokio::spawn(async move {
                let (turn, name) = one.await.expect("it ends");
                tell.send(name).expect("somebody listens");
                drop(turn);
            })
        });
        drop(first);
        for expected in ["now", "next", "next but one", "later"] {
            assert_eq!(timeout(Duration::from_secs(10), told.recv()).await, Ok(Some(expected)));
        }
        for one in all {
            one.await.expect("it ends");
        }
        assert_eq!(turns.books().free, 1);
    }

    #[tokio::test]
    async fn who_waits_no_more_costs_no_turn() {
        let turns = Turns::new(2);
        let held = [turns.take(&Wanted::next()).await, turns.take(&Wanted::next()).await];
        let gone = wait(&turns, &Wanted::next(), "gone");
        let stays = wait(&turns, &Wanted::later(), "stays");
        tokio::task::yield_now().await;
        gone.abort();
        assert!(gone.await.is_err());
        drop(held);
        let (turn, name) = stays.await.expect("it ends");
        assert_eq!(name, "stays");
        drop(turn);
        let books = turns.books();
        assert_eq!((books.free, books.waiting.len()), (2, 0));
    }

    #[tokio::test]
    async fn a_turn_that_was_given_and_not_taken_goes_on() {
        let turns = Turns::new(1);
        let held = turns.take(&Wanted::next()).await;
        let mut waits = Box::pin({
            let turns = turns.clone();
            async move { turns.take(&Wanted::next()).await }
        });
        assert!(timeout(Duration::ZERO, &mut waits).await.is_err());
        drop(held);
        assert_eq!(turns.books().free, 0, "it was given");
        drop(waits);
        assert_eq!(turns.books().free, 1);
    }
}

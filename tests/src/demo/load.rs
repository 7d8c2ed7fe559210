//! Sends requests at times that do not wait for answers, in bursts, and examines every answer.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::functions::{Exam, Plan, compare};
use crate::{
    Result, Trouble,
    http::Client,
    node::Sidecar,
    oip::{Answer, Outcome, Tensor},
    random::Random,
};

/// Requests of one function in flight at most; more wait here, and their waiting counts.
const CLIENTS: usize = 6;
/// How long a client waits for an answer before the request counts as unanswered.
const PATIENCE: Duration = Duration::from_secs(30);
/// Mean time between two bursts of one function.
const BURST_EVERY_S: f64 = 4.0;
/// Mean time between two requests of a burst.
const BURST_GAP_S: f64 = 0.06;
/// Wrong answers and refusals that are told in words, for each function.
const COMPLAINTS_MAX: usize = 3;
/// Stack of a client's thread.
const STACK: usize = 256 << 10;

/// When a function's requests arrive: bursts at random times, of random lengths, with random gaps.
pub fn arrivals(seed: u64, burst: f64, duration: Duration) -> Vec<Duration> {
    let mut random = Random::new(seed);
    let mut times = Vec::new();
    let mut start = random.exponential(BURST_EVERY_S / 2.0);
    while start < duration.as_secs_f64() {
        let mut at = start;
        loop {
            times.push(Duration::from_secs_f64(at));
            if random.unit() < 1.0 / burst.max(1.0) {
                break;
            }
            at += random.exponential(BURST_GAP_S);
        }
        start += random.exponential(BURST_EVERY_S);
    }
    times.retain(|time| *time < duration);
    times.sort_unstable();
    times
}

/// Leaves out a random part, so that a slow machine is not drowned: what is measured is sharing, not overload.
pub fn thin(times: &mut Vec<Duration>, keep: f64, seed: u64) {
    let mut random = Random::new(seed);
    times.retain(|_| random.unit() < keep);
}

/// What came of a function's requests.
#[derive(Debug, Default)]
pub struct Tally {
    /// Latencies of answers by weights that were there, and by weights that had to be brought.
    pub resident: Vec<Duration>,
    /// See `resident`.
    pub swapped: Vec<Duration>,
    /// Answers within the deadline.
    pub met: usize,
    /// Refusals.
    pub refused: usize,
    /// Requests that came to nothing.
    pub unanswered: usize,
    /// Answers that differ from the plain session's.
    pub wrong: usize,
    /// The first few of the last three, in words.
    pub complaints: Vec<String>,
    /// The latest answer to each exam.
    pub latest: Vec<Option<Vec<Tensor>>>,
}

impl Tally {
    /// Right and wrong answers.
    pub fn answered(&self) -> usize {
        self.resident.len() + self.swapped.len()
    }

    fn complain(&mut self, what: String) {
        if self.complaints.len() < COMPLAINTS_MAX {
            self.complaints.push(what);
        }
    }

    fn note(&mut self, exam: &Exam, at: usize, outcome: Result<Outcome>, took: Duration, slo: Duration) {
        match outcome {
            Ok(Outcome::Answered(answer)) => self.examine(exam, at, answer, took, slo),
            Ok(Outcome::Refused(status, why)) => {
                self.refused += 1;
                self.complain(format!("{}: refused with {status}: {why}", exam.label));
            }
            Err(error) => {
                self.unanswered += 1;
                self.complain(format!("{}: no answer: {error}", exam.label));
            }
        }
    }

    fn examine(&mut self, exam: &Exam, at: usize, answer: Answer, took: Duration, slo: Duration) {
        if answer.resident { &mut self.resident } else { &mut self.swapped }.push(took);
        self.met += usize::from(took <= slo);
        if let Some(difference) = compare(&exam.expected, &answer.outputs) {
            self.wrong += 1;
            self.complain(format!("{}: wrong output: {difference}", exam.label));
        }
        if let Some(latest) = self.latest.get_mut(at) {
            *latest = Some(answer.outputs);
        }
    }
}

/// A function under load.
#[derive(Debug)]
pub struct Subject {
    /// What it is.
    pub plan: Plan,
    /// What it is asked.
    pub exams: Vec<Exam>,
    /// When.
    pub times: Vec<Duration>,
    tally: Mutex<Tally>,
    next: AtomicUsize,
}

impl Subject {
    /// A function that has not been asked yet.
    pub fn new(plan: Plan, exams: Vec<Exam>, times: Vec<Duration>) -> Self {
        let tally = Tally { latest: vec![None; exams.len()], ..Tally::default() };
        Self { plan, exams, times, tally: Mutex::new(tally), next: AtomicUsize::new(0) }
    }

    /// What came of its requests so far.
    pub fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One client: takes the next arrival, waits until it is due, asks, notes what comes.
    fn ask(&self, mut client: Client, start: Instant) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(due) = self.times.get(number).map(|time| start + *time) else { return };
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let at = number % self.exams.len();
            let outcome = self.exams[at].request.send(&mut client);
            self.tally().note(&self.exams[at], at, outcome, due.elapsed(), self.plan.slo);
        }
    }
}

/// Asks every function at its times; `progress` is called now and then with the time since the start.
pub fn run(
    subjects: &[Subject],
    sidecars: &[Sidecar],
    every: Duration,
    mut progress: impl FnMut(Duration),
) -> Result<()> {
    let start = Instant::now();
    thread::scope(|scope| {
        let mut clients = Vec::new();
        for (subject, sidecar) in subjects.iter().zip(sidecars) {
            for _ in 0..CLIENTS {
                let client = sidecar.client(PATIENCE);
                let thread = thread::Builder::new().stack_size(STACK);
                clients.push(thread.spawn_scoped(scope, move || subject.ask(client, start))?);
            }
        }
        let mut shown = start;
        while clients.iter().any(|client| !client.is_finished()) {
            thread::sleep(crate::process::POLL_EVERY);
            if shown.elapsed() >= every {
                shown = Instant::now();
                progress(start.elapsed());
            }
        }
        let ended = clients.into_iter().map(|client| client.join());
        ended.collect::<std::result::Result<(), _>>().map_err(|_| Trouble::new("a client has panicked"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_replay_from_their_seed_and_stay_within_the_time() {
        let minute = Duration::from_secs(60);
        let times = arrivals(3, 8.0, minute);
        assert_eq!(times, arrivals(3, 8.0, minute));
        assert_ne!(times, arrivals(4, 8.0, minute));
        assert!(times.is_sorted() && times.iter().all(|time| *time < minute) && times.len() > 10, "{}", times.len());
        let mut fewer = times.clone();
        thin(&mut fewer, 0.5, 1);
        assert!(fewer.len() < times.len() && !fewer.is_empty());
    }
}

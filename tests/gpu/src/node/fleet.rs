//! The functions' clients: each registers one function with the broker as a sidecar does, asks when it is told to, and
//! compares every answer, bit for bit, with the first that the function gave.

use std::{
    path::Path,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use faaswap_protocol::{Batching, Bytes, FunctionSpec, Late, Priority, Slo, Tf32};
use faaswap_sidecar::{
    broker::{Broker as Client, BrokerConfig, InferError, InferRequest, SlabSizes, Target},
    model::ModelSource,
};
use tokio::sync::mpsc;

use super::{bases::Base, variants::Design};
use crate::Result;

/// Threads that clients share: one answers thousands of requests a second.
const THREADS_MAX: usize = 6;
/// Requests that were handed to a thread and not begun; with more, the clients are what is slow.
const JOBS_MAX: usize = 4096;
/// How long an answer may take: to show that something hangs, not that it is slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often is looked whether all requests were handed over.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The slab of each client; memory is taken only where tensors have been.
const SLAB_HALF: Bytes = Bytes::mib(32);

/// What came of one request.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) function: usize,
    /// When it was to be sent, and how much later it was.
    pub(crate) due: Instant,
    pub(crate) late: Duration,
    /// From then until the answer.
    pub(crate) took: Duration,
    pub(crate) end: Ending,
}

#[derive(Clone, Debug)]
pub(crate) enum Ending {
    Answered(Answered),
    /// Declined, with a code.
    Refused(&'static str),
    /// Nothing came, and why.
    Failed(String),
}

/// What an answer said of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    pub(crate) right: bool,
    /// Whether the weights were there when the request came.
    pub(crate) was_resident: bool,
    /// In the broker: until it was given to a lane, and on the lane.
    pub(crate) queued: Duration,
    pub(crate) ran: Duration,
}

impl Answered {
    /// From the request's frame to the answer's.
    pub(crate) fn in_broker(&self) -> Duration {
        self.queued + self.ran
    }

    /// Whether its weights had to be copied, which takes so long, where nothing else could have made it wait.
    pub(crate) fn was_brought(&self, copy: Duration) -> bool {
        !self.was_resident || self.queued > copy / 2
    }
}

/// What a fleet tells.
#[derive(Debug)]
enum News {
    /// A function can be called, after so long, and answered twice; or why it cannot.
    Registered {
        function: usize,
        after: Duration,
        first: std::result::Result<[Outcome; 2], String>,
    },
    Answered(Outcome),
}

#[derive(Clone, Copy, Debug)]
struct Job {
    function: usize,
    due: Instant,
}

/// The first answer of each function, output by output.
type Goldens = Arc<Vec<OnceLock<Vec<Vec<u8>>>>>;

/// One function as its client knows it.
struct Subject {
    function: usize,
    client: Client,
    request: InferRequest,
    goldens: Goldens,
}

/// All clients of one broker.
#[derive(Debug)]
pub(crate) struct Fleet {
    jobs: Vec<mpsc::Sender<Job>>,
    news: Receiver<News>,
    goldens: Goldens,
    threads: Vec<thread::JoinHandle<()>>,
}

/// How registration went.
#[derive(Debug, Default)]
pub(crate) struct Registered {
    pub(crate) took: Duration,
    /// Functions that can be called.
    pub(crate) ready: usize,
    pub(crate) refused: Vec<String>,
    /// Host memory of the broker's own, beyond weights, for each function and device.
    pub(crate) memory_each_mb: f64,
    /// The first requests of functions, while others were still registered.
    pub(crate) outcomes: Vec<Outcome>,
}

impl Registered {
    /// Milliseconds that first requests took while functions were still being registered, sorted.
    pub(crate) fn latencies(&self) -> Vec<f64> {
        let answered = self.outcomes.iter().filter(|outcome| matches!(outcome.end, Ending::Answered(_)));
        let mut all: Vec<_> = answered.map(|outcome| outcome.took.as_secs_f64() * 1e3).collect();
        all.sort_unstable_by(f64::total_cmp);
        all
    }
}

impl Fleet {
    /// Connects all functions to a broker at once; they register as fast as it lets them.
    pub(crate) fn start(socket: &Path, bases: &[Base], designs: &[Design]) -> Result<Self> {
        let goldens: Goldens = Arc::new(designs.iter().map(|_| OnceLock::new()).collect());
        let requests = bases.iter().map(request).collect::<Result<Vec<_>>>()?;
        let (tell, news) = channel();
        let count = thread::available_parallelism().map_or(1, usize::from).div_ceil(2).min(THREADS_MAX);
        let mut fleet = Self { jobs: Vec::new(), news, goldens: Arc::clone(&goldens), threads: Vec::new() };
        for number in 0..count {
            let mine = designs.iter().enumerate().skip(number).step_by(count);
            let mine =
                mine.map(|(function, design)| Ok((function, config(socket, design)?, requests[design.base].clone())));
            let mine = mine.collect::<Result<Vec<_>>>()?;
            let (jobs, todo) = mpsc::channel(JOBS_MAX);
            let (goldens, tell) = (Arc::clone(&goldens), tell.clone());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let work = move || runtime.block_on(work(mine, todo, &tell, &goldens));
            fleet.threads.push(thread::Builder::new().name(format!("clients-{number}")).spawn(work)?);
            fleet.jobs.push(jobs);
        }
        Ok(fleet)
    }

    /// Waits until all are registered, or declined, or it is too late; says how far it is now and then.
    pub(crate) fn register(&self, all: usize, until: Instant) -> Registered {
        const SAY_EVERY: Duration = Duration::from_secs(5);
        let (start, mut said) = (Instant::now(), Instant::now());
        let mut registered = Registered::default();
        while registered.ready + registered.refused.len() < all && Instant::now() < until {
            match self.news.recv_timeout(SAY_EVERY.min(until.saturating_duration_since(Instant::now()))) {
                Ok(News::Registered { after, first: Ok(first), .. }) => {
                    registered.ready += 1;
                    registered.took = registered.took.max(after);
                    registered.outcomes.extend(first);
                }
                Ok(News::Registered { function, first: Err(why), .. }) => {
                    registered.refused.push(format!("function {function}: {why}"));
                }
                Ok(News::Answered(outcome)) => registered.outcomes.push(outcome),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                println!("  {} of {all} functions after {:.0} s", registered.ready, start.elapsed().as_secs_f64());
            }
        }
        registered
    }

    /// Asks functions at their times, whether earlier requests are answered or not; `look` is called with each outcome, and
    /// with none now and then. Gives how many requests could not be handed to a client.
    pub(crate) fn drive(&self, requests: &[(Duration, usize)], mut look: impl FnMut(Option<Outcome>)) -> usize {
        let (start, jobs) = (Instant::now(), &self.jobs);
        thread::scope(|scope| {
            let mut dispatcher = Some(scope.spawn(move || dispatch(jobs, requests, start)));
            let (mut handed, mut ended, mut give_up) = (usize::MAX, 0, None);
            while ended < handed && give_up.is_none_or(|at| Instant::now() < at) {
                match self.news.recv_timeout(LOOK_EVERY) {
                    Ok(News::Answered(outcome)) => {
                        ended += 1;
                        look(Some(outcome));
                    }
                    Ok(News::Registered { .. }) => {}
                    Err(RecvTimeoutError::Timeout) => look(None),
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if let Some(ended) = dispatcher.take_if(|dispatcher| dispatcher.is_finished()) {
                    handed = ended.join().unwrap_or(0);
                    give_up = Some(Instant::now() + PATIENCE * 2);
                }
            }
            requests.len().saturating_sub(handed)
        })
    }

    /// Asks one function after the other, each when the one before has answered. Ends early where no answer comes.
    pub(crate) fn ask(&self, functions: impl IntoIterator<Item = usize>) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for function in functions {
            let job = Job { function, due: Instant::now() };
            let thread = self.jobs.get(function % self.jobs.len().max(1));
            if thread.is_none_or(|thread| thread.try_send(job).is_err()) {
                break;
            }
            // Functions that were registered late say so in between.
            let mut news = std::iter::from_fn(|| self.news.recv_timeout(PATIENCE * 2).ok());
            let answer = news.find_map(|news| match news {
                News::Answered(outcome) => Some(outcome),
                News::Registered { .. } => None,
            });
            match answer {
                Some(outcome) => outcomes.push(outcome),
                None => break,
            }
        }
        outcomes
    }

    /// The first answer of a function.
    pub(crate) fn golden(&self, function: usize) -> Option<&Vec<Vec<u8>>> {
        self.goldens.get(function)?.get()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.jobs.clear();
        for thread in self.threads.drain(..) {
            // One that has panicked has said so.
            let _ended = thread.join();
        }
    }
}

/// Hands each request over when it is due; stops where a client's thread has ended. Gives how many it has handed over.
fn dispatch(jobs: &[mpsc::Sender<Job>], requests: &[(Duration, usize)], start: Instant) -> usize {
    let mut handed = 0;
    for &(at, function) in requests {
        let due = start + at;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let Some(thread) = jobs.get(function % jobs.len().max(1)) else { break };
        handed += usize::from(thread.try_send(Job { function, due }).is_ok());
    }
    handed
}

fn request(base: &Base) -> Result<InferRequest> {
    let mut request = InferRequest::default();
    for (index, (dtype, shape, data)) in base.inputs.iter().enumerate() {
        let data = bytes::Bytes::from(data.clone());
        request = request.input(u16::try_from(index)?, *dtype, shape.dims(), data)?;
    }
    Ok(request)
}

fn config(socket: &Path, design: &Design) -> Result<BrokerConfig> {
    let function = FunctionSpec {
        name: design.name.parse()?,
        model: design.digest,
        slo: Slo { deadline: design.deadline, percentile: 9800 },
        priority: Priority::Latency,
        late: Late::Serve,
        batching: Batching::default(),
        tf32: Tf32::default(),
    };
    let model = ModelSource::known(design.digest);
    let mut config = BrokerConfig::new(Target::Socket(socket.to_owned()), function, model);
    config.slab = SlabSizes { request: SLAB_HALF, response: SLAB_HALF };
    config.away_wait = Some(PATIENCE);
    Ok(config)
}

/// A thread of clients, until nobody can give it jobs any more.
async fn work(
    mine: Vec<(usize, BrokerConfig, InferRequest)>,
    mut jobs: mpsc::Receiver<Job>,
    tell: &Sender<News>,
    goldens: &Goldens,
) {
    let mut subjects = std::collections::BTreeMap::new();
    for (function, config, request) in mine {
        let (client, goldens) = (Client::start(config), Arc::clone(goldens));
        let subject = Arc::new(Subject { function, client, request, goldens });
        subjects.insert(function, Arc::clone(&subject));
        let tell = tell.clone();
        tokio::spawn(async move { drop(tell.send(subject.register().await)) });
    }
    while let Some(Job { function, due }) = jobs.recv().await {
        let Some(subject) = subjects.get(&function).map(Arc::clone) else { continue };
        let tell = tell.clone();
        tokio::spawn(async move { drop(tell.send(News::Answered(subject.ask(due).await))) });
    }
}

impl Subject {
    async fn register(&self) -> News {
        let (function, start) = (self.function, Instant::now());
        let ready = self.client.until_ready().await;
        let after = start.elapsed();
        let first = match ready {
            Ok(_) => Ok([self.ask(Instant::now()).await, self.ask(Instant::now()).await]),
            Err(refusal) => Err(refusal.to_string()),
        };
        News::Registered { function, after, first }
    }

    async fn ask(&self, due: Instant) -> Outcome {
        let start = Instant::now();
        let asked = tokio::time::timeout(PATIENCE, self.client.infer(&self.request)).await;
        let took = start.elapsed();
        let end = match asked {
            Ok(Ok(answer)) => {
                let golden = self.goldens.get(self.function).map(|golden| {
                    golden.get_or_init(|| answer.outputs.iter().map(|output| output.data.to_vec()).collect())
                });
                let same = |golden: &Vec<Vec<u8>>| {
                    let pairs = golden.iter().zip(&answer.outputs);
                    golden.len() == answer.outputs.len()
                        && pairs.into_iter().all(|(want, have)| want[..] == have.data[..])
                };
                let timing = answer.timing;
                let right = golden.is_some_and(same);
                Ending::Answered(Answered {
                    right,
                    was_resident: timing.was_resident,
                    queued: timing.queued,
                    ran: timing.ran,
                })
            }
            Ok(Err(InferError::Refused(refusal))) => Ending::Refused(refusal.code()),
            Ok(Err(error)) => Ending::Failed(error.to_string()),
            Err(_) => Ending::Failed(format!("no answer within {PATIENCE:?}")),
        };
        Outcome { function: self.function, due, late: start.saturating_duration_since(due), took, end }
    }
}

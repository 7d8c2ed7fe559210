//! The client of the broker: registers one function and asks for inferences, whatever happens to the broker meanwhile.
//!
//! A request lives in its caller's task: it is sent on the connection that is open, and when that connection ends
//! without an answer it waits for the next one and is sent again, until its deadline. Its inputs stay with it, so a
//! broker's death loses nothing. Whether inputs fit the model is checked before, by `infer`; here they are bytes.

mod answer;
mod dial;
mod draft;
mod exchange;
mod link;
mod register;
mod room;
mod socket;
mod supervise;

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
};

use faaswap_protocol::{FunctionSpec, Refusal, Signature, TensorSpec};
use tokio::{
    sync::watch,
    time::{Duration, Instant, timeout_at},
};

pub use self::{
    dial::{SlabSizes, Target},
    draft::Draft,
    exchange::{InferAnswer, InferRequest, OutputTensor, TensorInput},
    socket::LinkError,
};
use self::{
    draft::Layout,
    link::{Attempt, Link},
    room::Waiting,
};
use crate::{
    fetch::{Progress, Stage},
    limits::{SENDS_MAX, WAITING_MAX},
    model::ModelSource,
};

/// What a broker client needs to know.
#[derive(Clone, Debug)]
pub struct BrokerConfig {
    /// Where brokers may listen; tried in order, each time.
    pub targets: Vec<Target>,
    /// The function to register.
    pub function: FunctionSpec,
    /// Its model, fetched and uploaded when the broker does not have it.
    pub model: ModelSource,
    /// Wanted sizes of the slab.
    pub slab: SlabSizes,
    /// Who this is, for the broker's logs.
    pub agent: String,
    /// How long a request without a timeout of its own waits for an absent broker; `None`: as long as the function's
    /// SLO deadline.
    pub away_wait: Option<Duration>,
}

impl BrokerConfig {
    /// One broker, slab halves of 64 MiB, and patience as long as the function's deadline.
    pub fn new(target: Target, function: FunctionSpec, model: ModelSource) -> Self {
        Self {
            targets: vec![target],
            function,
            model,
            slab: SlabSizes::default(),
            agent: concat!("faaswap-sidecar ", env!("CARGO_PKG_VERSION")).to_owned(),
            away_wait: None,
        }
    }
}

/// How the function stands with the broker.
#[derive(Clone, Debug)]
pub enum FunctionState {
    /// No broker answers.
    Connecting,
    /// The model is on its way from its server.
    Fetching(Arc<Progress>),
    /// The model cannot be fetched from its server, at least now.
    Unfetched(String),
    /// The model is being sent.
    Uploading,
    /// The broker works on the model.
    Preparing(String),
    /// Requests are served.
    Ready(Ready),
    /// The broker declined.
    Rejected(Refusal),
}

impl FunctionState {
    /// The state in one word, for metrics and listings.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Fetching(_) => "fetching",
            Self::Unfetched(_) => "unfetched",
            Self::Uploading => "uploading",
            Self::Preparing(_) => "preparing",
            Self::Ready(_) => "ready",
            Self::Rejected(_) => "rejected",
        }
    }
}

impl From<Stage> for FunctionState {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::Fetching(progress) => Self::Fetching(progress),
            Stage::Failed(why) => Self::Unfetched(why),
        }
    }
}

impl std::fmt::Display for FunctionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connecting => f.write_str("connecting to the broker"),
            Self::Fetching(progress) => progress.fmt(f),
            Self::Unfetched(why) => write!(f, "the model cannot be fetched: {why}"),
            Self::Uploading => f.write_str("uploading the model to the broker"),
            Self::Preparing(stage) => write!(f, "the broker is preparing the model: {stage}"),
            Self::Ready(_) => f.write_str("ready"),
            Self::Rejected(refusal) => write!(f, "the broker declined the function: {refusal}"),
        }
    }
}

/// A function that can be called.
#[derive(Clone, Debug)]
pub struct Ready {
    /// What the broker says of it.
    pub known: Arc<Known>,
    link: Arc<Link>,
}

/// What stays true of a function across brokers: it follows from the model's digest.
#[derive(Debug, PartialEq, Eq)]
pub struct Known {
    /// What the model takes and gives.
    pub signature: Signature,
    /// Size of its weights.
    pub weights: faaswap_protocol::Bytes,
}

impl Known {
    /// Position of the input with this name.
    pub fn input(&self, name: &str) -> Option<u16> {
        position(&self.signature.inputs, name)
    }

    /// Position of the output with this name.
    pub fn output(&self, name: &str) -> Option<u16> {
        position(&self.signature.outputs, name)
    }
}

fn position(specs: &[TensorSpec], name: &str) -> Option<u16> {
    specs.iter().position(|spec| spec.name == name).and_then(|at| u16::try_from(at).ok())
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    /// The broker declined.
    #[error("{0}")]
    Refused(Refusal),
    /// The function has never been ready.
    #[error("the function is not ready: {0}")]
    NotReady(FunctionState),
    /// No broker came back in time.
    #[error("no broker within {waited:?}: {state}")]
    BrokerAway {
        /// How long the request waited.
        waited: Duration,
        /// What the function was doing instead.
        state: FunctionState,
    },
    /// The connection ended each time the request was sent.
    #[error("the broker was lost {sends} times before it answered")]
    BrokerLost {
        /// How often it was sent.
        sends: u32,
    },
    /// Too many requests wait already.
    #[error("{WAITING_MAX} requests are waiting already")]
    WaitingFull,
    /// No room became free in time.
    #[error("no room in the slab within {waited:?}: too many requests in flight")]
    NoRoom {
        /// How long the request waited.
        waited: Duration,
    },
    /// The inputs exceed what one request may carry.
    #[error("the inputs take {needed} bytes and at most {size} can be sent to the broker")]
    TooLarge {
        /// What they take.
        needed: u64,
        /// What there is.
        size: u64,
    },
    /// The caller's time limit passed.
    #[error("no answer within the request's time limit of {0:?}")]
    TimedOut(Duration),
}

impl From<FunctionState> for InferError {
    /// What a request is told that cannot be sent in this state.
    fn from(state: FunctionState) -> Self {
        match state {
            FunctionState::Rejected(refusal) => Self::Refused(refusal),
            FunctionState::Connecting
            | FunctionState::Fetching(_)
            | FunctionState::Unfetched(_)
            | FunctionState::Uploading
            | FunctionState::Preparing(_)
            | FunctionState::Ready(_) => Self::NotReady(state),
        }
    }
}

#[derive(Debug)]
struct Shared {
    config: BrokerConfig,
    states: watch::Sender<FunctionState>,
    known: OnceLock<Arc<Known>>,
    waiting: Waiting,
    /// Whether a request came while the function was not ready.
    missed: watch::Sender<bool>,
}

/// A handle to the client; the connection ends when the last one is dropped.
#[derive(Clone, Debug)]
pub struct Broker {
    shared: Arc<Shared>,
    _task: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Broker {
    /// Starts connecting and registering in a task of the current runtime.
    pub fn start(config: BrokerConfig) -> Self {
        let shared = Arc::new(Shared {
            config,
            states: watch::Sender::new(FunctionState::Connecting),
            known: OnceLock::new(),
            waiting: Waiting::default(),
            missed: watch::Sender::new(false),
        });
        let task = tokio::spawn(supervise::keep_connected(Arc::clone(&shared)));
        Self { shared, _task: Arc::new(AbortOnDrop(task)) }
    }

    /// How the function stands, now and from now on.
    pub fn function(&self) -> watch::Receiver<FunctionState> {
        self.shared.states.subscribe()
    }

    /// How the function stands now.
    pub fn state(&self) -> FunctionState {
        self.shared.states.borrow().clone()
    }

    /// Whether a request would be sent at once.
    pub fn is_ready(&self) -> bool {
        matches!(&*self.shared.states.borrow(), FunctionState::Ready(ready) if ready.link.is_open())
    }

    /// What the model takes and gives, once the function was ready; remembered while the broker is away.
    pub fn known(&self) -> Option<Arc<Known>> {
        self.shared.known.get().map(Arc::clone)
    }

    /// Waits until the function is ready, or declined for good.
    pub async fn until_ready(&self) -> Result<Arc<Known>, Refusal> {
        let mut states = self.function();
        loop {
            match &*states.borrow_and_update() {
                FunctionState::Ready(ready) => return Ok(Arc::clone(&ready.known)),
                FunctionState::Rejected(refusal) if !refusal.is_passing() => return Err(refusal.clone()),
                FunctionState::Rejected(_)
                | FunctionState::Connecting
                | FunctionState::Fetching(_)
                | FunctionState::Unfetched(_)
                | FunctionState::Uploading
                | FunctionState::Preparing(_) => {}
            }
            if states.changed().await.is_err() {
                return Err(Refusal::Draining);
            }
        }
    }

    /// Requests that wait for the broker or for room.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.count()
    }

    /// Takes room in the slab for inputs of these sizes, so that they can be written there while they arrive. `None`
    /// where that cannot be had at once: then the inputs have to be collected first.
    pub fn draft(&self, lens: impl Iterator<Item = u64>) -> Option<Draft> {
        let layout = Layout::of(lens)?;
        match &*self.shared.states.borrow() {
            FunctionState::Ready(ready) => ready.link.draft(layout),
            FunctionState::Connecting
            | FunctionState::Fetching(_)
            | FunctionState::Unfetched(_)
            | FunctionState::Uploading
            | FunctionState::Preparing(_)
            | FunctionState::Rejected(_) => None,
        }
    }

    /// Tells the broker that a request is about to come, so that it can bring the weights meanwhile.
    pub fn announce(&self) {
        if let FunctionState::Ready(ready) = &*self.shared.states.borrow() {
            ready.link.expect_one();
        }
    }

    /// Asks for one inference. Dropping the future takes the request back.
    pub async fn infer(&self, request: &InferRequest) -> Result<InferAnswer, InferError> {
        self.infer_from(request, None).await
    }

    /// Asks for one inference whose inputs were written into `draft`, in the request's order; the request holds no data.
    pub async fn infer_drafted(&self, request: &InferRequest, draft: Draft) -> Result<InferAnswer, InferError> {
        self.infer_from(request, Some(draft)).await
    }

    async fn infer_from(&self, request: &InferRequest, draft: Option<Draft>) -> Result<InferAnswer, InferError> {
        if self.shared.known.get().is_none() {
            self.shared.missed.send_replace(true);
            return Err(self.state().into());
        }
        match request.timeout {
            None => self.infer_across_brokers(request, draft).await,
            Some(limit) => tokio::time::timeout(limit, self.infer_across_brokers(request, draft))
                .await
                .unwrap_or(Err(InferError::TimedOut(limit))),
        }
    }

    async fn infer_across_brokers(
        &self,
        request: &InferRequest,
        draft: Option<Draft>,
    ) -> Result<InferAnswer, InferError> {
        let arrived = Instant::now();
        let config = &self.shared.config;
        let deadline = arrived + request.timeout.unwrap_or(config.function.slo.deadline);
        let patience = arrived + request.timeout.or(config.away_wait).unwrap_or(config.function.slo.deadline);
        // The first time, and without a limit of its own, the function's deadline counts from the broker's clock.
        let mut told = request.timeout.map(|_| deadline);
        let mut request = Cow::Borrowed(request);
        let mut sends = 0;
        if let Some(draft) = draft {
            let (link, written) = (Arc::clone(&draft.link), draft.written());
            match link.infer_drafted(&request, draft, told).await {
                Ok(answer) => return Ok(answer),
                Err(attempt) => self.may_go_on(attempt, &link, &mut sends, arrived)?,
            }
            let lost = |_| InferError::BrokerLost { sends };
            request = Cow::Owned(written.read_back(&request).map_err(lost)?);
            told = Some(deadline);
        }
        loop {
            let link = self.link(arrived, patience).await?;
            let room_until = deadline.max(patience);
            match link.infer(&request, told, room_until, &self.shared.waiting).await {
                Ok(answer) => return Ok(answer),
                Err(attempt) => self.may_go_on(attempt, &link, &mut sends, arrived)?,
            }
            told = Some(deadline);
        }
    }

    /// Whether a request without an answer may be sent again.
    fn may_go_on(&self, attempt: Attempt, link: &Link, sends: &mut u32, arrived: Instant) -> Result<(), InferError> {
        match attempt {
            Attempt::Lost => {
                *sends += 1;
                if *sends >= SENDS_MAX {
                    return Err(InferError::BrokerLost { sends: *sends });
                }
                tracing::info!(sends, function = %self.shared.config.function.name, "request goes to the next broker");
                Ok(())
            }
            Attempt::Refused(Refusal::Draining) => {
                link.retire();
                Ok(())
            }
            Attempt::Refused(refusal) => Err(InferError::Refused(refusal)),
            Attempt::WaitingFull => Err(InferError::WaitingFull),
            Attempt::NoRoom => Err(InferError::NoRoom { waited: arrived.elapsed() }),
            Attempt::TooLarge { needed, size } => Err(InferError::TooLarge { needed, size }),
        }
    }

    /// The connection to use: the open one, or the next one that opens in time.
    async fn link(&self, arrived: Instant, patience: Instant) -> Result<Arc<Link>, InferError> {
        if let FunctionState::Ready(ready) = &*self.shared.states.borrow()
            && ready.link.is_open()
        {
            return Ok(Arc::clone(&ready.link));
        }
        self.shared.missed.send_replace(true);
        let _waits = self.shared.waiting.enter().ok_or(InferError::WaitingFull)?;
        let mut states = self.shared.states.subscribe();
        loop {
            match &*states.borrow_and_update() {
                FunctionState::Ready(ready) if ready.link.is_open() => return Ok(Arc::clone(&ready.link)),
                FunctionState::Rejected(refusal) => return Err(InferError::Refused(refusal.clone())),
                FunctionState::Ready(_)
                | FunctionState::Connecting
                | FunctionState::Fetching(_)
                | FunctionState::Unfetched(_)
                | FunctionState::Uploading
                | FunctionState::Preparing(_) => {}
            }
            match timeout_at(patience, states.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => {
                    return Err(InferError::BrokerAway { waited: arrived.elapsed(), state: self.state() });
                }
            }
        }
    }
}

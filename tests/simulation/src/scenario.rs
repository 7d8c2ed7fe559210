//! The scenarios: which node, which functions, which requests, and what counts as kept.

use faaswap_protocol::{Bytes, Late};
use faaswap_scheduler::{PolicyKind, SchedulerConfig};

use crate::{
    catalog::{self, MS, ModelSpec, NodeSpec, SECOND},
    figures::Measured,
    outcome::Outcome,
    random::Random,
    workload::{self, Counts, FunctionSpec, Workload},
    world::{Fault, Setting, simulate},
};

/// The paper's experiments last ten minutes; one more warms the node.
const MINUTES: usize = 11;
/// Nodes of the paper's cluster.
const NODES: usize = 6;

/// The policies with their names in tables.
pub fn policies(seed: u64) -> [(&'static str, PolicyKind); 5] {
    [
        ("faaswap", PolicyKind::Faaswap),
        ("torpor", PolicyKind::Torpor),
        ("lru", PolicyKind::Lru),
        ("fifo", PolicyKind::Fifo),
        ("random", PolicyKind::Random { seed }),
    ]
}

/// A run of one policy with what all scenarios have in common.
pub fn play(node: &NodeSpec, models: &[ModelSpec], workload: &Workload, policy: PolicyKind, seed: u64) -> Outcome {
    simulate(node, models, workload, &setting(policy, seed))
}

/// Run times that vary by 3%, and nothing goes wrong.
pub fn setting(policy: PolicyKind, seed: u64) -> Setting {
    let config = SchedulerConfig { policy, ..SchedulerConfig::default() };
    Setting {
        config,
        late: Late::Serve,
        noise: 0.03,
        faults: Vec::new(),
        seed,
        check: false,
        timed: false,
        batching: None,
        record: false,
    }
}

/// A node, its models, and what it is asked.
pub type Stage = (NodeSpec, Vec<ModelSpec>, Workload);

/// Where requests come from: the published trace, or one that no one has tuned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// The published counts, drawn by the seed.
    Published,
    /// Counts that are drawn by the seed themselves.
    HeldBack,
}

impl Trace {
    fn counts(self, seed: u64) -> Counts {
        match self {
            Self::Published => workload::published_counts(),
            Self::HeldBack => workload::drawn_counts(seed, 200, 20),
        }
    }
}

/// The paper's node and mix under a trace.
pub fn paper(trace: Trace, n: usize, policy: PolicyKind, seed: u64) -> Outcome {
    let models = catalog::paper_models();
    let workload = workload::replay(&trace.counts(seed), &models, n, MINUTES, seed);
    play(&catalog::paper_node(4), &models, &workload, policy, seed)
}

/// 40 functions that all run ResNet-152, asked 200 times a minute.
pub fn balance(policy: PolicyKind, seed: u64) -> Outcome {
    let models: Vec<_> = catalog::paper_models().into_iter().filter(|model| model.name == "resnet152").collect();
    let workload = workload::steady(&models, 40, 200.0, 6, seed);
    play(&catalog::paper_node(4), &models, &workload, policy, seed)
}

/// 44 functions with BERT, whose weights take 60% of the memory, and 400 with the lighter models.
///
/// Gives the outcome, and the p98 of BERT's requests as the share of functions with BERT that keep their objective.
pub fn mixed(per_minute: f64, policy: PolicyKind, seed: u64) -> Outcome {
    const HEAVY: usize = 44;
    const LIGHT: usize = 400;
    let models = catalog::paper_models();
    let bert = models.len() - 1;
    let function = |at: usize| {
        let model = if at < HEAVY { bert } else { at % bert };
        FunctionSpec { model, deadline: models[model].deadline }
    };
    let functions = (0..HEAVY + LIGHT).map(function).collect();
    let workload = Workload { functions, ..workload::steady(&models, HEAVY + LIGHT, per_minute, MINUTES, seed) };
    play(&catalog::paper_node(4), &models, &workload, policy, seed)
}

/// Six nodes behind a front end that knows functions and nothing else; deadlines of 150 and 250 ms.
pub fn cluster(n: usize, policy: PolicyKind, seed: u64) -> Outcome {
    let mut models = catalog::paper_models();
    for model in &mut models {
        model.deadline = if model.deadline > 100 * MS { 250 * MS } else { 150 * MS };
    }
    let all = workload::replay(&workload::published_counts(), &models, n, MINUTES, seed);
    let mut route = Random::new(seed).fork(8);
    let routes: Vec<_> = (0..n).map(|_| route.below(NODES)).collect();
    let node = catalog::paper_node(4);
    let on = |node_at: usize| play(&node, &models, &part(&all, |function| routes[function] == node_at), policy, seed);
    Outcome::merge((0..NODES).map(on).collect())
}

/// The functions of one node, and their requests.
fn part(all: &Workload, is_here: impl Fn(usize) -> bool) -> Workload {
    let mut places = vec![None; all.functions.len()];
    let mut functions = Vec::new();
    for (function, spec) in all.functions.iter().enumerate().filter(|(function, _)| is_here(*function)) {
        places[function] = Some(functions.len());
        functions.push(*spec);
    }
    let here = all.requests.iter();
    let requests = here.filter_map(|r| Some(workload::Request { function: places[r.function]?, ..*r })).collect();
    Workload { functions, requests, ..*all }
}

/// 2000 functions, popular by Zipf's law and asked in bursts, on 8 H100s; `per_minute` is the mean.
pub fn bursty(per_minute: f64, seed: u64) -> Stage {
    let models = catalog::h100_models();
    let workload = workload::bursty(&models, 2000, 1.1, per_minute, 2, seed);
    (catalog::h100_node(8), models, workload)
}

/// One H100 of which 25 GB hold weights, and 400 functions with the paper's models: the link is what is scarce.
pub fn bus_bound(per_minute: f64, seed: u64) -> Stage {
    let mut node = catalog::h100_node(1);
    node.devices[0].capacity = Bytes::new(25_000_000_000);
    let models = catalog::h100_paper_models();
    let workload = workload::steady(&models, 400, per_minute, 6, seed);
    (node, models, workload)
}

/// H100s with NVLink between any two, of which 25 GB each hold weights, and for each 400 functions under the published
/// requests times `rate`. Models and links are those that were measured, where there are figures.
pub fn h100s(figures: Option<&Measured>, gpus: usize, rate: f64, seed: u64) -> Stage {
    const FUNCTIONS_EACH: usize = 400;
    const MINUTES_SHORT: usize = 4;
    let mut node = catalog::h100_node(gpus);
    for device in &mut node.devices {
        device.capacity = Bytes::new(25_000_000_000);
        device.link = figures.map_or(device.link, |figures| figures.link);
    }
    let models = figures.map_or_else(catalog::h100_paper_models, |figures| figures.models.clone());
    let counts = times(&workload::published_counts(), rate);
    let workload = workload::replay(&counts, &models, FUNCTIONS_EACH * gpus, MINUTES_SHORT, seed);
    (node, models, workload)
}

/// Four H100s of which 25 GB each hold weights, whose links carry less when all are busy, and 480 functions under the published
/// requests times `rate`, while run times vary by `noise`: predictions are wrong by as much. One and a half minutes.
pub fn noisy(noise: f64, rate: f64, policy: PolicyKind, seed: u64) -> Outcome {
    const FUNCTIONS: usize = 480;
    const SPAN: u64 = 90 * SECOND;
    /// What the host links of four carried together, measured.
    const ALL_LINKS: u64 = 142_000_000_000;
    let (mut node, models) = (catalog::h100_node(4), catalog::h100_paper_models());
    for device in &mut node.devices {
        device.capacity = Bytes::new(25_000_000_000);
    }
    node.shared = vec![((0..node.devices.len()).collect(), ALL_LINKS)];
    let counts = times(&workload::published_counts(), rate);
    let mut workload = workload::replay(&counts, &models, FUNCTIONS, 2, seed);
    workload.span = SPAN;
    workload.requests.retain(|request| request.at < SPAN);
    simulate(&node, &models, &workload, &Setting { noise, ..setting(policy, seed) })
}

/// So many times the counts.
fn times(counts: &Counts, rate: f64) -> Counts {
    counts.iter().map(|line| line.iter().map(|count| count * rate).collect()).collect()
}

/// Few functions that are asked often: one of each of the paper's models on each of two GPUs. `batching` is the part of a run
/// that each further request in it adds; `None` where each request runs alone.
pub fn batching(per_minute: f64, batching: Option<f64>, policy: PolicyKind, seed: u64) -> Outcome {
    let models = catalog::paper_models();
    let workload = workload::steady(&models, 16, per_minute, 3, seed);
    simulate(&catalog::paper_node(2), &models, &workload, &Setting { batching, ..setting(policy, seed) })
}

/// Functions with the paper's models that timers call every 30 s, a tenth of a second early or late, on two H100s with memory
/// for a third of them; with `strangers`, as many more that are called by chance, as often on average.
pub fn prefetch(strangers: bool, ahead: bool, seed: u64) -> Outcome {
    const TIMERS: usize = 96;
    let models = catalog::h100_paper_models();
    let mut node = catalog::h100_node(2);
    for device in &mut node.devices {
        device.capacity = Bytes::new(4_500_000_000);
    }
    let mut workload = workload::timers(&models, TIMERS, 30 * SECOND, SECOND / 10, 20 * 60 * SECOND, seed);
    if strangers {
        let by_chance = workload::steady(&models, TIMERS, 2.0, 20, seed);
        let beside = by_chance.requests.into_iter().map(|r| workload::Request { function: r.function + TIMERS, ..r });
        workload.requests.extend(beside);
        workload.requests.sort_unstable();
        workload.functions.extend(by_chance.functions);
    }
    // A rhythm is seen after some gaps.
    workload.counted_from = 5 * 60 * SECOND;
    let setting = setting(PolicyKind::Faaswap, seed);
    let config = SchedulerConfig { ahead, ..setting.config };
    simulate(&node, &models, &workload, &Setting { config, ..setting })
}

/// Round and round over more than fits: the worst for any cache; in waves of eight.
pub fn adversarial(policy: PolicyKind, seed: u64) -> Outcome {
    let models = catalog::paper_models();
    let workload = workload::adversarial(&models, 480, 8, 110 * MS, 120 * SECOND);
    play(&catalog::paper_node(4), &models, &workload, policy, seed)
}

/// A stuck copy, then a link at a third of its speed, then a lost device, at half of the published load.
pub fn faults(policy: PolicyKind, seed: u64) -> Outcome {
    let models = catalog::paper_models();
    let workload = workload::replay(&workload::published_counts(), &models, 240, MINUTES, seed);
    let at = |second: u64| second * SECOND;
    let faults = vec![
        (at(120), Fault::Stuck { device: 1, until: at(123) }),
        (at(240), Fault::Slow { device: 2, permille: 333 }),
        (at(420), Fault::Lost { device: 0 }),
    ];
    simulate(&catalog::paper_node(4), &models, &workload, &Setting { faults, ..setting(policy, seed) })
}

/// [`bus_bound`], and in its first minute the link carries a twentieth for ten seconds: all functions fall behind.
pub fn setback(per_minute: f64, policy: PolicyKind, seed: u64) -> Outcome {
    const SLOW_FROM: u64 = 20 * SECOND;
    let (node, models, mut workload) = bus_bound(per_minute, seed);
    workload.counted_from = 60 * SECOND;
    let slow = |permille| Fault::Slow { device: 0, permille };
    // Each is of what the link carried then.
    let faults = vec![(SLOW_FROM, slow(50)), (SLOW_FROM + 10 * SECOND, slow(20_000))];
    simulate(&node, &models, &workload, &Setting { faults, ..setting(policy, seed) })
}

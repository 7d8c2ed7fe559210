//! What the scheduler costs: time per event at two sizes of a node, and whether memory grows over many events.

use std::{fs, process::ExitCode, time::Duration};

use faaswap_protocol::{Batching, Bytes, Late, Priority, Slo};
use faaswap_scheduler::{
    Action, DeviceId, Event, FunctionKey, ModelId, Moment, PolicyKind, RequestKey, Scheduler, SchedulerConfig,
};
use faaswap_simulation::{
    catalog,
    outcome::ratio,
    random::Random,
    scenario, workload,
    world::{Setting, simulate},
};

/// Functions, requests a minute of each on average, and the goal for the median in nanoseconds.
const SIZES: [(usize, f64, u32); 2] = [(1_000, 60.0, 3_000), (10_000, 12.0, 8_000)];
/// Events of the long run, and where its memory is first looked at.
const EVENTS: u64 = 10_000_000;
const WARM: u64 = 1_000_000;
/// Requests in flight in the long run.
const IN_FLIGHT: usize = 64;
/// So much growth is the allocator's, not ours.
const GROWTH_MAX_KIB: u64 = 1_024;

fn main() -> ExitCode {
    let mut good = true;
    for (functions, per_minute, goal) in SIZES {
        good &= time_per_event(functions, per_minute, goal);
    }
    good &= memory_over_many_events();
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Bursty requests on eight H100s; set-up events are not counted.
fn time_per_event(functions: usize, per_minute: f64, goal: u32) -> bool {
    let (node, models) = (catalog::h100_node(8), catalog::h100_models());
    let workload = workload::bursty(&models, functions, 1.1, per_minute, 2, 1);
    let setting = Setting { timed: true, ..scenario::setting(PolicyKind::Faaswap, 1) };
    let outcome = simulate(&node, &models, &workload, &setting);
    let set_up = functions * (1 + 2 * node.devices.len()) + 100;
    let mut nanos = outcome.step_nanos[set_up.min(outcome.step_nanos.len() / 2)..].to_vec();
    nanos.sort_unstable();
    let at = |permille: usize| nanos[(nanos.len() - 1) * permille / 1000];
    let (median, p99) = (at(500), at(990));
    let share = outcome.compliant_share() * 100.0;
    println!(
        "{functions} functions, 8 GPUs, {} events: median {:.2} us (goal {:.0}), p99 {:.2} us; {share:.1}% compliant",
        nanos.len(),
        ratio(u64::from(median), 1000),
        ratio(u64::from(goal), 1000),
        ratio(u64::from(p99), 1000),
    );
    median <= goal
}

/// A node that answers at once, ten million events long.
fn memory_over_many_events() -> bool {
    let mut mill = Mill::new(1_000, 8);
    let mut before = 0;
    while mill.events < EVENTS {
        mill.turn();
        if before == 0 && mill.events >= WARM {
            before = resident_kib();
        }
    }
    let after = resident_kib();
    println!("memory over {EVENTS} events: {before} KiB after {WARM}, {after} KiB at the end");
    after <= before + GROWTH_MAX_KIB
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Requests in, answers out, as fast as it goes.
struct Mill {
    scheduler: Scheduler,
    random: Random,
    functions: usize,
    now: Duration,
    requests: u64,
    events: u64,
    actions: Vec<Action>,
    running: Vec<RequestKey>,
    copies: Vec<(ModelId, DeviceId)>,
    leaving: Vec<(ModelId, DeviceId)>,
}

impl Mill {
    fn new(functions: u32, devices: u16) -> Self {
        let mut mill = Self {
            scheduler: Scheduler::new(SchedulerConfig::default()),
            random: Random::new(1),
            functions: functions as usize,
            now: Duration::ZERO,
            requests: 0,
            events: 0,
            actions: Vec::new(),
            running: Vec::new(),
            copies: Vec::new(),
            leaving: Vec::new(),
        };
        for device in (0..devices).map(DeviceId) {
            mill.tell(Event::DeviceAdded { device, capacity: Bytes::mib(8 << 10), lanes: 4 });
        }
        for function in 0..functions {
            let model = ModelId(function);
            for device in (0..devices).map(DeviceId) {
                mill.tell(Event::ModelBound { model, device, charge: Bytes::mib(64 + u64::from(function % 8) * 32) });
            }
            let slo = Slo { deadline: Duration::from_millis(50), percentile: 9_800 };
            let (function, priority, late) = (FunctionKey(function), Priority::Latency, Late::Serve);
            mill.tell(Event::FunctionAdded { function, model, slo, priority, late, batching: Batching::Off });
        }
        mill
    }

    fn turn(&mut self) {
        self.now += Duration::from_micros(100);
        if self.running.len() + self.scheduler.waiting_len() < IN_FLIGHT {
            let function = self.random.below(self.functions.min(1 + self.random.clone().below(self.functions)));
            let function = FunctionKey(u32::try_from(function).unwrap_or(0));
            let (request, deadline) = (RequestKey(self.requests), Moment(self.now + Duration::from_millis(50)));
            self.requests += 1;
            self.tell(Event::Arrived { request, function, deadline, form: None });
        }
        if let Some((model, device)) = self.copies.pop() {
            self.tell(Event::SwapInDone { model, device, took: Duration::from_millis(4) });
        }
        if !self.running.is_empty() {
            let request = self.running.swap_remove(self.random.below(self.running.len()));
            self.tell(Event::RunDone { request, took: Duration::from_millis(2) });
        }
    }

    fn tell(&mut self, event: Event) {
        let mut actions = std::mem::take(&mut self.actions);
        self.scheduler.step(Moment(self.now), event, &mut actions);
        self.events += 1;
        for action in actions.drain(..) {
            match action {
                Action::Run { request, .. } => self.running.push(request),
                Action::SwapIn { model, device, .. } => self.copies.push((model, device)),
                Action::SwapOut { model, device } => self.leaving.push((model, device)),
                Action::Refuse { .. } | Action::WakeAt(_) => {}
            }
        }
        self.actions = actions;
        if let Some((model, device)) = self.leaving.pop() {
            self.tell(Event::SwapOutDone { model, device });
        }
    }
}

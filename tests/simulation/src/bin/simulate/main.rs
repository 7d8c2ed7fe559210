//! Runs every scenario and writes tables and plots: `faaswap-simulate [FOLDER] [--seeds N] [--only NAME] [--figures FILE]`.
//!
//! FILE is the `figures.json` of `faaswap-gpu figures`: then the H100s of one scenario cost what was measured there.
//! With `--trace FILE`, it plays what a broker has recorded instead, with every policy.

mod trouble;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use faaswap_scheduler::PolicyKind;
use faaswap_simulation::{
    figures::{self, Measured},
    optimum,
    outcome::{Outcome, ratio},
    plot::{Line, Plot},
    recorded,
    report::{self, Row},
    scenario::{self, Trace, policies},
    search::{largest, median},
};

/// Seeds of the published trace; those of held-back traces start elsewhere.
const SEEDS: u64 = 3;
const HELD_BACK_FROM: u64 = 1000;

/// One scenario with its tables and plots.
type Part = fn(&mut Run) -> std::io::Result<()>;

#[derive(Clone)]
struct Run {
    folder: PathBuf,
    seeds: u64,
    only: Option<String>,
    figures: Option<Measured>,
    trace: Option<PathBuf>,
    started: Instant,
    rows: Vec<Row>,
}

const USAGE: &str =
    "faaswap-simulate [FOLDER] [--seeds N] [--only SCENARIO] [--figures FIGURES.json] [--trace TRACE-OF-A-BROKER]";

fn main() -> ExitCode {
    let mut run = Run {
        folder: PathBuf::from("target/simulation"),
        seeds: SEEDS,
        only: None,
        figures: None,
        trace: None,
        started: Instant::now(),
        rows: Vec::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seeds" => run.seeds = args.next().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS),
            "--only" => run.only = args.next(),
            "--figures" => match args.next().as_deref().and_then(read_figures) {
                Some(figures) => run.figures = Some(figures),
                None => {
                    eprintln!("--figures: that is no file of figures");
                    return ExitCode::FAILURE;
                }
            },
            "--trace" => run.trace = args.next().map(PathBuf::from),
            unknown if unknown.starts_with('-') => {
                eprintln!("usage: {USAGE}");
                return if unknown == "--help" { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            }
            folder => run.folder = PathBuf::from(folder),
        }
    }
    match run.all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the simulation ends here, with its results in {}: {error}", run.folder.display());
            ExitCode::FAILURE
        }
    }
}

fn read_figures(path: &str) -> Option<Measured> {
    figures::measured(&serde_json::from_slice(&std::fs::read(path).ok()?).ok()?, "-fp32")
}

/// The same for our policy and the published one, on two threads.
fn both<T: Send>(figure: impl Fn(PolicyKind) -> T + Sync) -> [T; 2] {
    std::thread::scope(|scope| {
        let ours = scope.spawn(|| figure(PolicyKind::Faaswap));
        let theirs = figure(PolicyKind::Torpor);
        [ours.join().expect("the simulation does not panic"), theirs]
    })
}

impl Run {
    fn all(&mut self) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let parts: [(&str, Part); 15] = [
            ("paper", Self::paper),
            ("largest", Self::largest),
            ("balance", Self::balance),
            ("mixed", Self::mixed),
            ("cluster", Self::cluster),
            ("bursty", Self::bursty),
            ("bus-bound", Self::bus_bound),
            ("h100s", Self::h100s),
            ("noisy", Self::noisy),
            ("overload", Self::overload),
            ("setback", Self::setback),
            ("adversarial", Self::adversarial),
            ("faults", Self::faults),
            ("batching", Self::batching),
            ("prefetch", Self::prefetch),
        ];
        if let Some(trace) = self.trace.clone() {
            self.recorded(&trace)?;
        }
        let wanted = |name: &str| self.trace.is_none() && self.only.as_ref().is_none_or(|only| only == name);
        let parts: Vec<Part> = parts.into_iter().filter(|(name, _)| wanted(name)).map(|(_, part)| part).collect();
        let rows = self.side_by_side(&parts)?;
        self.rows.extend(rows);
        report::write(&self.folder, &self.rows)?;
        self.say(&format!("written to {}", self.folder.display()));
        Ok(())
    }

    /// Runs parts, as many at a time as there are processors; gives their rows, in the parts' order.
    fn side_by_side(&self, parts: &[Part]) -> std::io::Result<Vec<Row>> {
        let next = AtomicUsize::new(0);
        let work = || -> std::io::Result<Vec<(usize, Vec<Row>)>> {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(part) = parts.get(at) else { return Ok(done) };
                let mut run = Self { rows: Vec::new(), ..self.clone() };
                part(&mut run)?;
                done.push((at, run.rows));
            }
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(parts.len());
        let done = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            let ends = workers.into_iter().map(|worker| worker.join().expect("the simulation does not panic"));
            ends.collect::<std::io::Result<Vec<_>>>()
        })?;
        let mut rows: Vec<_> = done.into_iter().flatten().collect();
        rows.sort_unstable_by_key(|(at, _)| *at);
        Ok(rows.into_iter().flat_map(|(_, rows)| rows).collect())
    }

    fn say(&self, what: &str) {
        println!("[{:5.1} s] {what}", self.started.elapsed().as_secs_f64());
    }

    fn add(&mut self, scenario: &str, policy: &str, seed: u64, outcome: &Outcome) {
        let row = Row::of(scenario, policy, seed, outcome);
        self.say(&format!(
            "{scenario} {policy} seed {seed}: {} of {} functions compliant, p98 {:.1} ms, load CoV {:.3}",
            row.compliant, row.functions, row.p98_ms, row.load_cov
        ));
        self.rows.push(row);
    }

    /// What a broker has recorded, with every policy.
    fn recorded(&mut self, trace: &Path) -> std::io::Result<()> {
        let text = std::fs::read_to_string(trace)?;
        let (node, models, workload) = recorded::stage(&text).map_err(std::io::Error::other)?;
        for (name, policy) in policies(1) {
            let outcome = scenario::play(&node, &models, &workload, policy, 1);
            self.add("recorded", name, 1, &outcome);
        }
        Ok(())
    }

    /// The share of compliant functions over their number, and the published points.
    fn paper(&mut self) -> std::io::Result<()> {
        let mut lines: Vec<_> = policies(1).map(|(name, _)| Line { name: name.to_owned(), points: Vec::new() }).into();
        for n in [160, 240, 320, 400, 480, 560, 640, 720] {
            for (at, (name, policy)) in policies(1).into_iter().enumerate() {
                let outcome = scenario::paper(Trace::Published, n, policy, 1);
                lines[at].points.push((ratio(n as u64, 1), outcome.compliant_share() * 100.0));
                self.add(&format!("paper-{n}"), name, 1, &outcome);
            }
        }
        for (trace, first) in [(Trace::Published, 2), (Trace::HeldBack, HELD_BACK_FROM)] {
            for (seed, n) in (first..first + self.seeds).flat_map(|seed| [(seed, 480), (seed, 560)]) {
                for (name, policy) in policies(seed).into_iter().take(2) {
                    let outcome = scenario::paper(trace, n, policy, seed);
                    let held_back = if trace == Trace::HeldBack { "-held-back" } else { "" };
                    self.add(&format!("paper-{n}{held_back}"), name, seed, &outcome);
                }
            }
        }
        let plot = Plot {
            title: "Functions that keep their p98 on four V100s (simulated)".to_owned(),
            x_axis: "functions, 5 to 30 requests a minute each".to_owned(),
            y_axis: "compliant, %".to_owned(),
            x: (160.0, 720.0),
            y: (0.0, 100.0),
            lines,
        };
        std::fs::write(self.folder.join("compliant.svg"), plot.svg())
    }

    /// The most functions of which all are compliant.
    fn largest(&mut self) -> std::io::Result<()> {
        for trace in [Trace::Published, Trace::HeldBack] {
            let (name, first) = match trace {
                Trace::Published => ("largest", 1),
                Trace::HeldBack => ("largest-held-back", HELD_BACK_FROM),
            };
            let mut found = [Vec::new(), Vec::new()];
            for seed in first..first + self.seeds {
                for (at, (policy_name, policy)) in policies(seed).into_iter().take(2).enumerate() {
                    let holds = |n| scenario::paper(trace, n, policy, seed).all_compliant();
                    let most = largest(200, 800, 10, holds).unwrap_or(0);
                    self.say(&format!("{name} {policy_name} seed {seed}: all of {most} functions compliant"));
                    self.rows.push(Row::largest(name, policy_name, seed, most));
                    found[at].push(most);
                }
            }
            let [ours, theirs] = found.map(median);
            self.say(&format!("{name}: {ours} against {theirs}: {:.2}", ratio(ours as u64, theirs as u64)));
        }
        Ok(())
    }

    fn balance(&mut self) -> std::io::Result<()> {
        for seed in 1..=self.seeds {
            for (name, policy) in policies(seed).into_iter().take(2) {
                let outcome = scenario::balance(policy, seed);
                self.add("balance", name, seed, &outcome);
            }
        }
        Ok(())
    }

    /// The rate at which a function with BERT, or another one, first misses its objective.
    fn mixed(&mut self) -> std::io::Result<()> {
        let mut lines: Vec<_> = policies(1).map(|(name, _)| Line { name: name.to_owned(), points: Vec::new() }).into();
        for per_minute in [6_u32, 9, 12, 15, 18, 21] {
            for (at, (name, policy)) in policies(1).into_iter().enumerate() {
                let outcome = scenario::mixed(f64::from(per_minute), policy, 1);
                lines[at].points.push((f64::from(per_minute), outcome.compliant_share() * 100.0));
                self.add(&format!("mixed-{per_minute}-per-minute"), name, 1, &outcome);
            }
        }
        let mut found = [Vec::new(), Vec::new(), Vec::new()];
        for seed in 1..=self.seeds {
            for (at, (name, policy)) in policies(seed).into_iter().take(3).enumerate() {
                let holds = |tenths: usize| scenario::mixed(ratio(tenths as u64, 10), policy, seed).all_compliant();
                let most = largest(10, 300, 5, holds).unwrap_or(0);
                self.say(&format!("mixed {name} seed {seed}: all compliant up to {most} tenths of a request a minute"));
                self.rows.push(Row::largest("mixed-tenths-per-minute", name, seed, most));
                found[at].push(most);
            }
        }
        let [ours, torpor, _] = found.map(median);
        self.say(&format!("mixed: {ours} against {torpor}: {:.2}", ratio(ours as u64, torpor as u64)));
        let plot = Plot {
            title: "BERT takes 60% of the memory, 400 lighter functions beside it (simulated)".to_owned(),
            x_axis: "requests a minute of each of 444 functions".to_owned(),
            y_axis: "compliant, %".to_owned(),
            x: (6.0, 21.0),
            y: (0.0, 100.0),
            lines,
        };
        std::fs::write(self.folder.join("mixed.svg"), plot.svg())
    }

    /// The most functions on six nodes of which all, and of which 99 of 100, are compliant.
    fn cluster(&mut self) -> std::io::Result<()> {
        for (scenario, share) in [("cluster-all", 1.0), ("cluster-99-percent", 0.99)] {
            let mut found = [Vec::new(), Vec::new()];
            for seed in 1..=self.seeds {
                let of_both = both(|policy| {
                    let holds = |n| scenario::cluster(n, policy, seed).compliant_share() >= share;
                    let most = largest(2000, 4800, 100, holds).unwrap_or(0);
                    (most, scenario::cluster(most, policy, seed))
                });
                for (at, (name, (most, outcome))) in ["faaswap", "torpor"].into_iter().zip(&of_both).enumerate() {
                    self.add(scenario, name, seed, outcome);
                    self.rows.push(Row::largest(scenario, name, seed, *most));
                    found[at].push(*most);
                }
            }
            let [ours, theirs] = found.map(median);
            let quotient = ratio(ours as u64, theirs as u64);
            self.say(&format!("{scenario}: {ours} against {theirs} functions: {quotient:.2}"));
        }
        Ok(())
    }

    /// The largest rate at which 99 of 100 functions are compliant, as a share of what the node could carry at all.
    /// The published policy is asked for less: far beyond what it carries, its queues take long to simulate.
    fn bursty(&mut self) -> std::io::Result<()> {
        let rates = ([(180, 270), (30, 120)], 30, "per-minute");
        self.share_of_optimum("bursty", 99, rates, (false, 1), scenario::bursty);
        Ok(())
    }

    /// The same where 95 of 100 are compliant, on one device whose link is scarce. Its requests are independent.
    fn bus_bound(&mut self) -> std::io::Result<()> {
        for seed in 1..=self.seeds {
            let rates = ([(4, 60), (4, 60)], 1, "per-minute");
            self.share_of_optimum("bus-bound", 95, rates, (true, seed), scenario::bus_bound);
        }
        Ok(())
    }

    fn share_of_optimum(
        &mut self,
        name: &str,
        percent: u32,
        (ranges, step, unit): ([(usize, usize); 2], usize, &str),
        (by_rates, seed): (bool, u64),
        make: impl Fn(f64, u64) -> scenario::Stage + Sync,
    ) {
        let found = both(|policy| {
            let mut best = None;
            let (low, high) = ranges[usize::from(policy != PolicyKind::Faaswap)];
            largest(low, high, step, |rate| {
                let (node, models, workload) = make(ratio(rate as u64, 1), seed);
                let outcome = scenario::play(&node, &models, &workload, policy, seed);
                let holds = outcome.compliant_share() * 100.0 >= f64::from(percent);
                if holds || best.is_none() {
                    best = Some((rate, outcome, optimum::bound(&node, &models, &workload)));
                }
                holds
            });
            best
        });
        for (policy, found) in ["faaswap", "torpor"].into_iter().zip(found) {
            let Some((rate, outcome, bound)) = found else { continue };
            self.add(&format!("{name}-{rate}-{unit}"), policy, seed, &outcome);
            let links = if by_rates { bound.links_by_rates } else { bound.links };
            let share = links.max(bound.devices);
            self.say(&format!(
                "{name} {policy}: {share:.2} of the optimum (links {:.2}, by rates {:.2}; devices {:.2})",
                bound.links, bound.links_by_rates, bound.devices
            ));
            if let Some(row) = self.rows.last_mut() {
                row.share_of_optimum = Some(share);
            }
        }
    }

    /// How many times the published requests four H100s carry, in halves, for 400 functions each; and eight, where nothing
    /// else is asked for: that takes minutes.
    fn h100s(&mut self) -> std::io::Result<()> {
        let figures = self.figures.clone();
        let numbers: &[usize] = if self.only.is_some() { &[4, 8] } else { &[4] };
        for &gpus in numbers {
            let make = |halves: f64, seed| scenario::h100s(figures.as_ref(), gpus, halves / 2.0, seed);
            self.share_of_optimum(&format!("h100s-{gpus}"), 95, ([(4, 16), (2, 10)], 1, "half-times"), (true, 1), make);
        }
        Ok(())
    }

    /// Requests that timers make, with and without bringing their models ahead, alone and beside requests by chance.
    fn prefetch(&mut self) -> std::io::Result<()> {
        for (beside, strangers) in [("alone", false), ("beside-chance", true)] {
            for (name, ahead) in [("off", false), ("on", true)] {
                for seed in 1..=self.seeds {
                    let outcome = scenario::prefetch(strangers, ahead, seed);
                    let (found, brought) = (outcome.resident_share(), outcome.swapped_ms());
                    let (mean, missed) = (outcome.mean_ms(), outcome.missed());
                    let name = format!("prefetch-{name}-{beside}");
                    self.add(&name, "faaswap", seed, &outcome);
                    self.say(&format!(
                        "{name}: {:.1}% found their weights there, the others took {brought:.1} ms (median); mean {mean:.1} ms; {missed} late",
                        found * 100.0
                    ));
                }
            }
        }
        Ok(())
    }

    /// The largest rate of which all functions are compliant, where each request runs alone, and where requests of a
    /// function may share a run: a further one adds a fifth of a run, a half, or a whole one (there is nothing to gain).
    fn batching(&mut self) -> std::io::Result<()> {
        for (name, share) in [("none", None), ("fifth", Some(0.2)), ("half", Some(0.5)), ("whole", Some(1.0))] {
            let mut found = Vec::new();
            for seed in 1..=self.seeds {
                let play = |rate| scenario::batching(ratio(rate as u64, 1), share, PolicyKind::Faaswap, seed);
                let most = largest(60, 1500, 20, |rate| play(rate).all_compliant()).unwrap_or(0);
                let scenario = format!("batching-{name}");
                self.rows.push(Row::largest(format!("{scenario}-per-minute"), "faaswap", seed, most));
                self.add(&format!("{scenario}-{most}-per-minute"), "faaswap", seed, &play(most));
                found.push(most);
            }
            self.say(&format!("batching, {name}: {} requests a minute of each function", median(found)));
        }
        Ok(())
    }
}

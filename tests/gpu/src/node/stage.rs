//! What all experiments with a broker begin with: models, functions with weights of their own, a broker, and what it costs
//! there to run and to swap when nothing else goes on.

use std::{
    fs,
    sync::Once,
    thread,
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;
use faaswap_scheduler::PolicyKind;
use faaswap_simulation::catalog::{ModelSpec, NodeSpec};
use faaswap_tests::process;
use serde_json::Value;

use super::{
    bases::{self, Base},
    broker::Broker,
    costs::{self, Cost, Links},
    fleet::{Ending, Fleet, Outcome, Registered},
    options::Options,
    predict,
    step::{self, Step},
    swaps::Swaps,
    variants::{self, Design, Folders},
};
use crate::{Result, model};

/// How long registering may take, for each function; and how long at least.
const REGISTERED_WITHIN_EACH: Duration = Duration::from_millis(700);
const REGISTERED_WITHIN: Duration = Duration::from_secs(60);
/// How long is waited until all are bound to all devices; they are served meanwhile.
const BOUND_WITHIN: Duration = Duration::from_secs(60);
/// How often it is looked whether all are bound to all devices.
const BOUND_LOOK_EVERY: Duration = Duration::from_millis(200);
/// Largest difference to a plain session's output, beside the largest value; TF32 and fp16 have 10 bits of fraction.
const TOLERANCE: f64 = 1e-2;
const TOLERANCE_ON_HOST: f64 = 1e-3;
/// Functions that were declined are named, so many of them.
const DECLINED_SHOWN: usize = 5;

/// What all experiments with a broker begin with.
pub(crate) struct Stage {
    pub(crate) options: Options,
    pub(crate) bases: Vec<Base>,
    pub(crate) designs: Vec<Design>,
    pub(crate) folders: Folders,
    pub(crate) weights: Bytes,
    references: Vec<Vec<Vec<u8>>>,
    pub(crate) device: String,
}

/// Waits until all models are bound to all devices: a function is served once it is bound to one.
fn bound_everywhere(broker: &Broker, until: Instant) -> Result<()> {
    let (start, devices) = (Instant::now(), broker.devices()?.as_array().map_or(0, Vec::len));
    let is_everywhere = |model: &Value| model["bound"].as_array().is_some_and(|bound| bound.len() == devices);
    loop {
        if broker.models()?.as_array().is_some_and(|models| models.iter().all(is_everywhere)) {
            break;
        }
        if Instant::now() >= until {
            println!("  NOT all are bound to all {devices} devices after {:.1} s", start.elapsed().as_secs_f64());
            return Ok(());
        }
        thread::sleep(BOUND_LOOK_EVERY);
    }
    if devices > 1 {
        println!("  bound to all {devices} devices {:.1} s later", start.elapsed().as_secs_f64());
    }
    Ok(())
}

impl Stage {
    /// Prepares the models, asks plain sessions, and writes the functions' weights.
    pub(crate) fn set(options: Options) -> Result<Self> {
        static TOGETHER: Once = Once::new();
        let mut together = Ok(());
        TOGETHER.call_once(|| together = process::end_together());
        together?;
        fs::create_dir_all(&options.out)?;
        let folders = Folders::make(&options)?;
        let start = Instant::now();
        let bases = bases::all(&options)?;
        if bases.is_empty() {
            return Err("no model can be prepared".into());
        }
        println!("{} models prepared after {:.1} s", bases.len(), start.elapsed().as_secs_f64());
        let runtime = model::runtime()?;
        let references = bases.iter().map(|base| bases::reference(&runtime, base)).collect::<Result<Vec<_>>>()?;
        println!("plain sessions answered after {:.1} s", start.elapsed().as_secs_f64());
        let designs = variants::designs(&options, &bases)?;
        let (flavour, device) = bases::flavour(&options)?;
        let weights = variants::write(&folders, flavour, &bases, &designs)?;
        Ok(Self { options, bases, designs, folders, weights, references, device })
    }

    /// Starts a broker and registers all functions with it.
    fn open(&self, policy: &str, faults: bool) -> Result<(Broker, Fleet, Registered)> {
        let broker = Broker::start(&self.options, &self.folders, policy, self.weights, faults)?;
        let empty = broker.memory()?;
        let fleet = Fleet::start(&broker.socket(), &self.bases, &self.designs)?;
        let count = u32::try_from(self.designs.len())?;
        let within = REGISTERED_WITHIN.max(REGISTERED_WITHIN_EACH * count).min(self.options.left());
        let mut registered = fleet.register(self.designs.len(), Instant::now() + within);
        let meanwhile = registered.latencies();
        println!(
            "  {} of {count} functions registered and bound in {:.1} s; {} requests were answered meanwhile, p50 {:.2} ms, p98 {:.2} ms",
            registered.ready,
            registered.took.as_secs_f64(),
            meanwhile.len(),
            step::permille(&meanwhile, 500),
            step::permille(&meanwhile, 980)
        );
        for why in registered.refused.iter().take(DECLINED_SHOWN) {
            println!("  declined: {why}");
        }
        if registered.ready == 0 {
            return Err(format!("no function could be registered: {}", broker.log_tail()).into());
        }
        bound_everywhere(&broker, Instant::now() + within.min(BOUND_WITHIN))?;
        let metrics = broker.metrics()?;
        let how = |how: &str| -> f64 {
            let all = metrics.all("faaswap_bindings_total").filter(|(labels, _)| labels.contains(how));
            all.map(|(_, count)| count).sum()
        };
        let bindings = registered.ready * self.options.devices.count();
        registered.memory_each_mb = broker.memory()?.saturating_sub(empty) as f64 / 1e6 / bindings.max(1) as f64;
        println!(
            "  bound {} times by a kind, {} times by a session; {:.2} MB of host memory of the broker's own for each function and device",
            how("kind"),
            how("session"),
            registered.memory_each_mb
        );
        Ok((broker, fleet, registered))
    }

    /// First answers that are not what a plain session says, of how many; and functions whose answer another of their
    /// model has given too.
    fn compare(&self, fleet: &Fleet) -> (u64, u64, usize) {
        let tolerance = if self.options.devices.is_host() { TOLERANCE_ON_HOST } else { TOLERANCE };
        let (mut wrong, mut checked) = (0, 0);
        let mut seen = std::collections::BTreeSet::new();
        let mut twice = 0;
        for (function, design) in self.designs.iter().enumerate() {
            let Some(golden) = fleet.golden(function) else { continue };
            twice += usize::from(!seen.insert((design.base, golden.clone())));
            if design.variant > 0 {
                continue;
            }
            let difference = bases::difference(&self.bases[design.base], golden, &self.references[design.base]);
            checked += 1;
            if difference.is_nan() || difference > tolerance {
                wrong += 1;
                println!("  WRONG: {} differs from a plain session by {difference:.2e}", design.name);
            }
        }
        println!(
            "  {checked} models' answers compared with a plain session's: {wrong} differ; {twice} functions answer as another one does"
        );
        (wrong, checked, twice)
    }

    /// A broker with all functions registered and everything known that the simulator needs.
    pub(crate) fn live(&self, policy: &str, faults: bool) -> Result<Live> {
        let kind = predict::policy(policy, self.options.seed)?;
        let (broker, fleet, registered) = self.open(policy, faults)?;
        let (wrong, compared, answers_alike) = self.compare(&fleet);
        let links = Links::of(&self.options, &broker)?;
        let link = links.alone.first().copied().unwrap_or(f64::NAN);
        let before = Swaps::read(&broker.metrics()?);
        let costs = costs::measure(&fleet, &self.bases, &self.designs, link);
        let beyond_ms = Swaps::read(&broker.metrics()?).since(before).beyond_ms(link);
        costs::say(&self.bases, &costs);
        println!("  a swap takes {beyond_ms:.2} ms beyond its bytes");
        let node = costs::node(&self.options, &broker, &links, beyond_ms)?;
        let models = costs::models(&self.bases, &costs, (link, beyond_ms));
        let answered = registered.outcomes.iter().filter_map(|outcome| match &outcome.end {
            Ending::Answered(answered) => Some(answered.right),
            Ending::Refused(_) | Ending::Failed(_) => None,
        });
        let first: Vec<bool> = answered.collect();
        let checked = compared + first.len() as u64 + costs.iter().map(|cost| cost.asked).sum::<u64>();
        let wrongly =
            first.iter().filter(|right| !**right).count() as u64 + costs.iter().map(|cost| cost.wrong).sum::<u64>();
        let wrong = wrong + wrongly;
        Ok(Live { fleet, broker, registered, costs, links, node, models, kind, checked, wrong, answers_alike })
    }
}

/// A broker that serves, and what is known of it. The clients go before it does.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) fleet: Fleet,
    pub(crate) broker: Broker,
    pub(crate) registered: Registered,
    pub(crate) costs: Vec<Cost>,
    pub(crate) links: Links,
    node: NodeSpec,
    models: Vec<ModelSpec>,
    kind: PolicyKind,
    /// Outputs compared so far, and those that were not what they should be.
    pub(crate) checked: u64,
    pub(crate) wrong: u64,
    /// Functions that answer as another one of their model does.
    pub(crate) answers_alike: usize,
}

impl Live {
    /// Lets another policy decide from now on; all has been answered.
    pub(crate) fn choose(&mut self, policy: &str, seed: u64) -> Result<()> {
        self.kind = predict::policy(policy, seed)?;
        self.broker.choose(policy)
    }

    /// Runs one rate for so many seconds, and says what the simulator makes of the same requests.
    pub(crate) fn step(
        &mut self,
        stage: &Stage,
        (rate, seconds): (f64, u64),
        each: impl FnMut(&Broker, Duration, Option<&Outcome>),
    ) -> Result<(Step, Value)> {
        let workload = step::requests(&self.models, &stage.designs, rate, (seconds, stage.options.seed));
        let mut each = each;
        let look = |at: Duration, outcome: Option<&Outcome>| each(&self.broker, at, outcome);
        let mut step = step::run(&self.broker, &self.fleet, &stage.designs, &workload, look)?;
        step.rate = rate;
        self.checked += step.checked;
        self.wrong += step.wrong;
        let links = self.links.total();
        step.say(links);
        let predicted = predict::predict(&self.node, &self.models, &workload, self.kind);
        let beside = predicted.beside(&step, &workload, links);
        predict::say(&beside);
        let mut value = step.json(links);
        value["predicted"] = predicted.json(&beside);
        Ok((step, value))
    }

    /// An error where an output was wrong.
    pub(crate) fn verdict(&self) -> Result<()> {
        match self.wrong {
            0 => Ok(()),
            wrong => Err(format!("{wrong} of {} outputs are wrong", self.checked).into()),
        }
    }
}

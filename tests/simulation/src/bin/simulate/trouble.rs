//! Scenarios in which something is not as it should be: run times that vary, more requests than can be served, a mean order of
//! requests, faults.

use faaswap_scheduler::PolicyKind;
use faaswap_simulation::{
    plot::{Line, Plot},
    scenario::{self, policies},
};

use crate::{Run, both};

/// How many times the published requests four H100s are asked for with noise ...
const NOISY_RATE: f64 = 33.0;
/// ... and beyond what they can do, where run times vary by so much.
const OVERLOADS: [f64; 5] = [36.0, 40.0, 45.0, 50.0, 60.0];
const OVERLOAD_NOISE: f64 = 0.3;
/// How often each function is asked that has a setback behind it.
const SETBACK_PER_MINUTE: f64 = 37.0;

impl Run {
    /// Functions that keep their p98 on four H100s near what these carry, as run times vary more and more.
    pub(super) fn noisy(&mut self) -> std::io::Result<()> {
        for percent in [3_u32, 30, 60] {
            for seed in 1..=self.seeds {
                let outcome = scenario::noisy(f64::from(percent) / 100.0, NOISY_RATE, PolicyKind::Faaswap, seed);
                let name = format!("noisy-{percent}-percent");
                self.add(&name, "faaswap", seed, &outcome);
                self.say(&format!("{name}: {:.0} copies a second between devices", outcome.peer_swaps_per_s()));
            }
        }
        Ok(())
    }

    /// The share of functions that keep their p98 as more and more is asked for.
    pub(super) fn overload(&mut self) -> std::io::Result<()> {
        let found = both(|policy| OVERLOADS.map(|rate| (rate, scenario::noisy(OVERLOAD_NOISE, rate, policy, 1))));
        let mut lines = Vec::new();
        for (name, outcomes) in ["faaswap", "torpor"].into_iter().zip(&found) {
            for (rate, outcome) in outcomes {
                self.add(&format!("overload-{rate}-times"), name, 1, outcome);
            }
            let points = outcomes.iter().map(|(rate, outcome)| (*rate, outcome.compliant_share() * 100.0)).collect();
            lines.push(Line { name: name.to_owned(), points });
        }
        let plot = Plot {
            title: "Functions that keep their p98 on four H100s, of 480 (simulated)".to_owned(),
            x_axis: "times the published requests".to_owned(),
            y_axis: "compliant, %".to_owned(),
            x: (OVERLOADS[0], OVERLOADS[OVERLOADS.len() - 1]),
            y: (0.0, 100.0),
            lines,
        };
        std::fs::write(self.folder.join("overload.svg"), plot.svg())
    }

    /// Functions that keep their p98 near what one H100 carries, after its link was slow for a while.
    pub(super) fn setback(&mut self) -> std::io::Result<()> {
        for seed in 1..=self.seeds {
            let outcome = scenario::setback(SETBACK_PER_MINUTE, PolicyKind::Faaswap, seed);
            self.add("setback", "faaswap", seed, &outcome);
            self.say(&format!("setback: {} of {} requests late", outcome.missed(), outcome.requests()));
        }
        Ok(())
    }

    pub(super) fn adversarial(&mut self) -> std::io::Result<()> {
        for (name, policy) in policies(1) {
            let outcome = scenario::adversarial(policy, 1);
            self.add("adversarial", name, 1, &outcome);
        }
        Ok(())
    }

    pub(super) fn faults(&mut self) -> std::io::Result<()> {
        for (name, policy) in policies(1) {
            let outcome = scenario::faults(policy, 1);
            self.add("faults", name, 1, &outcome);
        }
        let twice = [0, 1].map(|_| scenario::faults(PolicyKind::Faaswap, 7).digest);
        assert_eq!(twice[0], twice[1], "the same seed gives the same actions");
        Ok(())
    }
}

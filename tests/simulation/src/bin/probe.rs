//! Probe.
use faaswap_scheduler::{PolicyKind, SchedulerConfig};
use faaswap_simulation::{
    catalog::{self, *},
    optimum,
    workload::{self, *},
    world::{Setting, simulate},
};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let what = args[1].as_str();
    let seed: u64 = args[2].parse().unwrap();
    let xs: Vec<f64> = args[4].split(',').map(|n| n.parse().unwrap()).collect();
    for x in xs {
        let (node, models, w): (NodeSpec, Vec<ModelSpec>, Workload) = match what {
            "balance" => {
                let m = vec![catalog::paper_models()[6]];
                let w = workload::steady(&m, 40, x, 6, seed);
                (catalog::paper_node(4), m, w)
            }
            "mixed" => {
                let all = catalog::paper_models();
                let mut w = workload::steady(&all, 1, 1.0, 2, seed);
                let mut f = vec![FunctionSpec { model: 7, deadline: 200 * MS }; 44];
                for i in 0..400 {
                    f.push(FunctionSpec { model: i % 7, deadline: 80 * MS });
                }
                let one = vec![all[0]];
                w.functions = f;
                w.requests = workload::steady(&one, 444, x, 11, seed).requests;
                w.span = 660 * SECOND;
                w.counted_from = 60 * SECOND;
                (catalog::paper_node(4), all, w)
            }
            "bursty" => {
                let m = catalog::h100_models();
                let w = workload::bursty(&m, x as usize, 1.1, args[5].parse().unwrap(), 4, seed);
                (catalog::h100_node(8), m, w)
            }
            "adv" => {
                let m = catalog::paper_models();
                let w = workload::adversarial(&m, 400, 8, x as u64 * MS, 120 * SECOND);
                (catalog::paper_node(4), m, w)
            }
            "drawn" => {
                let m = catalog::paper_models();
                let c = workload::drawn_counts(seed, 200, 20);
                let w = workload::replay(&c, &m, x as usize, 11, seed);
                (catalog::paper_node(4), m, w)
            }
            "loose" => {
                let mut m = catalog::paper_models();
                for x in &mut m {
                    x.deadline = if x.deadline > 100 * MS { 250 * MS } else { 150 * MS };
                }
                let w = workload::replay(&workload::published_counts(), &m, x as usize, 11, seed);
                (catalog::paper_node(4), m, w)
            }
            _ => {
                let m = catalog::paper_models();
                let w = workload::replay(&workload::published_counts(), &m, x as usize, 11, seed);
                (catalog::paper_node(4), m, w)
            }
        };
        for policy in args[3].split(',') {
            let kind = match policy {
                "torpor" => PolicyKind::Torpor,
                "lru" => PolicyKind::Lru,
                "fifo" => PolicyKind::Fifo,
                "random" => PolicyKind::Random { seed },
                _ => PolicyKind::Faaswap,
            };
            let setting = Setting {
                config: SchedulerConfig { policy: kind, ..SchedulerConfig::default() },
                late: faaswap_protocol::Late::Serve,
                noise: 0.03,
                faults: vec![],
                seed,
                check: false,
            };
            let t = std::time::Instant::now();
            let o = simulate(&node, &models, &w, &setting);
            let swaps: (u64, u64) = o.devices.iter().fold((0, 0), |a, d| (a.0 + d.swaps.0, a.1 + d.swaps.1));
            let busy: f64 =
                o.devices.iter().map(|d| d.busy as f64).sum::<f64>() / (o.span as f64 * o.devices.len() as f64);
            let link: f64 = o.devices.iter().map(|d| d.copied).sum::<f64>() / (o.span as f64 / 1e9) / 1e9;
            let mut by = vec![(0u32, 0u32); models.len()];
            for (i, f) in o.functions.iter().enumerate() {
                let m = w.functions[i].model;
                by[m].0 += f.asked;
                by[m].1 += f.asked - f.met;
            }
            println!(
                "{policy:7} x={x} ok={}/{} {:.3} p50={:.1} p98={:.1} p999={:.1} max={:.1} swaps={swaps:?} of {} busy={busy:.2} link={link:.2}GB/s cov={:.3} missed={:?} steps={} wall={:?} {:?}",
                o.compliant(),
                o.functions.len(),
                o.compliant_share(),
                o.latency_ms(500),
                o.latency_ms(980),
                o.latency_ms(999),
                o.latency_ms(1000),
                o.requests(),
                o.load_cov(),
                by.iter().map(|b| b.1).collect::<Vec<_>>(),
                o.steps,
                t.elapsed(),
                if policy == "ours" { Some(optimum::bound(&node, &models, &w)) } else { None }
            );
        }
    }
}

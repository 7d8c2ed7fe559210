//! Probe.
use faaswap_scheduler::{PolicyKind, SchedulerConfig};
use faaswap_simulation::{catalog, workload, world::{simulate, Setting}};
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let ns: Vec<usize> = args[1].split(',').map(|n| n.parse().unwrap()).collect();
    let seed: u64 = args[2].parse().unwrap();
    let models = catalog::paper_models();
    let node = catalog::paper_node(4);
    let counts = workload::published_counts();
    for n in ns {
        for policy in args[3].split(',') {
            let kind = match policy { "torpor" => PolicyKind::Torpor, "lru" => PolicyKind::Lru, "fifo" => PolicyKind::Fifo, "random" => PolicyKind::Random { seed }, _ => PolicyKind::Faaswap };
            let w = workload::replay(&counts, &models, n, 11, seed);
            let setting = Setting { config: SchedulerConfig { policy: kind, ..SchedulerConfig::default() }, late: faaswap_protocol::Late::Serve, noise: 0.03, faults: vec![], seed, check: args.len() > 4 };
            let t = std::time::Instant::now();
            let o = simulate(&node, &models, &w, &setting);
            let swaps: (u64, u64) = o.devices.iter().fold((0, 0), |a, d| (a.0 + d.swaps.0, a.1 + d.swaps.1));
            let busy: f64 = o.devices.iter().map(|d| d.busy as f64).sum::<f64>() / (o.span as f64 * o.devices.len() as f64);
            let link: f64 = o.devices.iter().map(|d| d.copied).sum::<f64>() / (o.span as f64 / 1e9) / 24e9;
            let mut by = vec![(0u32, 0u32); models.len()];
            for (i, f) in o.functions.iter().enumerate() { let m = w.functions[i].model; by[m].0 += f.asked; by[m].1 += f.asked - f.met; }
            println!("{policy:8} n={n} compliant={} share={:.3} p50={:.1} p98={:.1} p999={:.1} max={:.1} swaps={swaps:?} of {} busy={busy:.2} link={link:.2} cov={:.3} missed={:?} steps={} wall={:?} answered={}",
              o.compliant(), o.compliant_share(), o.latency_ms(500), o.latency_ms(980), o.latency_ms(999), o.latency_ms(1000), o.requests(), o.load_cov(), by.iter().map(|b| b.1).collect::<Vec<_>>(), o.steps, t.elapsed(), o.latencies_us.len());
        }
    }
}

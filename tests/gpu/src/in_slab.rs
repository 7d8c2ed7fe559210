//! A request's inputs in shared memory, as a sidecar writes them: copied by the processor first, and read by the GPU where they
//! are.

use std::time::{Duration, Instant};

use faaswap_device::cuda::Registered;
use faaswap_engine::{Input, InputData};
use faaswap_protocol::{Bytes, SlabLayout, Span, limits::TENSOR_ALIGN};
use faaswap_slab::{Region, Slab};
use serde_json::{Value, json};

use crate::{Result, model::Asked, stats::median_ms};

/// What requests with inputs in a slab have shown.
#[derive(Clone, Debug)]
pub(crate) struct InSlab {
    /// How many inputs the GPU reads where they are.
    in_place: usize,
    /// Size of all inputs.
    bytes: usize,
    /// To register the slab.
    register_ms: f64,
    /// A request whose inputs are copied first, and one whose inputs are not.
    copied_ms: f64,
    in_place_ms: f64,
    /// Of each request, whether its outputs were right.
    pub(crate) right: Vec<bool>,
}

impl InSlab {
    pub(crate) fn told(&self) -> Value {
        json!({
            "inputs_in_place": self.in_place, "bytes": self.bytes, "register_ms": self.register_ms,
            "copied_ms": self.copied_ms, "in_place_ms": self.in_place_ms,
        })
    }
}

/// Asks with a model's usual inputs, one way and the other in turn, and after the slab's registration has gone once more. The
/// weights must be there.
pub(crate) fn measure(asked: &Asked, expected: &[u8], runs: usize) -> Result<InSlab> {
    let (all, regions) = written(asked)?;
    let start = Instant::now();
    let memory = faaswap_engine::register(&*asked.device, &all)?.ok_or("no GPU")?;
    let register_ms = start.elapsed().as_secs_f64() * 1e3;
    let copied = inputs(asked, &regions, None);
    let in_place = copied.iter().filter(|input| asked.bound.would_read_in_place(&[**input])).count();
    let (mut times, mut right) = ([Vec::new(), Vec::new()], Vec::new());
    let mut ask = |inputs: &[Input<'_>], times: &mut Vec<Duration>| -> Result<()> {
        let start = Instant::now();
        let output = asked.ask_with(inputs)?;
        times.push(start.elapsed());
        right.push(output == expected);
        Ok(())
    };
    for _ in 0..runs {
        ask(&copied, &mut times[0])?;
        ask(&inputs(asked, &regions, Some(&memory)), &mut times[1])?;
    }
    drop(memory);
    ask(&copied, &mut times[0])?;
    let [copied_ms, in_place_ms] = times.map(|mut all| median_ms(&mut all));
    Ok(InSlab { in_place, bytes: all.len(), register_ms, copied_ms, in_place_ms, right })
}

/// A slab with the model's inputs in it: all of it, and where each lies.
fn written(asked: &Asked) -> Result<(Region, Vec<Region>)> {
    let mut end = 0;
    let spans: Vec<_> = asked
        .inputs
        .iter()
        .map(|(_, _, data)| {
            let span = Span { offset: end, len: data.len() as u64 };
            end = (end + span.len).next_multiple_of(TENSOR_ALIGN);
            span
        })
        .collect();
    let (slab, _) = Slab::create(SlabLayout { request: Bytes::new(end), response: Bytes::ZERO })?;
    let regions =
        spans.into_iter().map(|span| slab.request_region(span)).collect::<std::result::Result<Vec<_>, _>>()?;
    for (region, (_, _, data)) in regions.iter().zip(asked.inputs.iter()) {
        region.write(0, data)?;
    }
    Ok((slab.request_region(Span { offset: 0, len: end })?, regions))
}

fn inputs<'a>(asked: &'a Asked, regions: &'a [Region], memory: Option<&'a Registered>) -> Vec<Input<'a>> {
    let input = |((dtype, shape, _), region): (&'a (_, _, Vec<u8>), &'a Region)| {
        let data = memory.map_or(InputData::Region(region), |memory| InputData::Registered(region, memory));
        Input { dtype: *dtype, shape, data }
    };
    asked.inputs.iter().zip(regions).map(input).collect()
}

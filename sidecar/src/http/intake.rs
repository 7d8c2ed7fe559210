//! Takes an infer request in: its JSON as a whole, its binary tensors straight into the slab while they arrive.
//!
//! Where there is no room in the slab at once, or the body is packed, the body is collected first. Heavy JSON is parsed
//! on a thread of its own, so that small requests beside it are not kept waiting.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use http_body::Body;

use super::{
    body::BodyReader,
    encoding::Coding,
    oip::Heavy,
    request::{self, HeaderLength, Parsed, Plan, Source},
    rest::Rest,
};
use crate::{
    broker::{Draft, Known},
    failure::Failure,
    infer::{Function, Lent, check},
    limits::HEAVY_BYTES,
};

/// What the headers say of an infer request; a copy, so that the memory of the headers is free while the body comes.
#[derive(Clone, Debug)]
pub struct Head {
    length: HeaderLength,
    coding: Option<Coding>,
    /// What the client accepts in the reply.
    pub accepts: Option<HeaderValue>,
}

impl Head {
    /// As the headers say it.
    pub fn of(headers: &HeaderMap) -> Result<Self, Failure> {
        let accepts = headers.get(header::ACCEPT_ENCODING).map(HeaderValue::as_bytes).map(HeaderValue::from_bytes);
        Ok(Self {
            length: HeaderLength::of(headers),
            coding: Coding::of_request(headers)?,
            accepts: accepts.and_then(Result::ok),
        })
    }
}

/// A request that fits the model; where there is a draft, its tensors lie there.
#[derive(Debug)]
pub struct TakenIn {
    /// The request.
    pub parsed: Parsed,
    /// Its tensors.
    pub draft: Option<Draft>,
}

/// Reads one request.
pub async fn take_in<B>(
    (function, heavy): (&Function, &Heavy),
    known: &Arc<Known>,
    head: Head,
    body: &mut BodyReader<B>,
    lent: &mut Lent<'_>,
) -> Result<TakenIn, Failure>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    if let (None, Some(json_len)) = (head.coding, head.length.announced().filter(|len| *len <= HEAVY_BYTES)) {
        return stream(function, known, (&head.length, json_len), body, lent).await;
    }
    let pieces = body.collect(lent).await?;
    let len = pieces.iter().map(Bytes::len).sum::<usize>();
    let parsed = match head.coding {
        None if len <= HEAVY_BYTES => request::parse(&known.signature, &head.length, pieces)?,
        None => {
            let known = Arc::clone(known);
            heavy.run(move || request::parse(&known.signature, &head.length, pieces)).await?
        }
        Some(coding) => {
            let (known, bytes_max) = (Arc::clone(known), body.bytes_max());
            let work = move || {
                let bytes = coding.unpack(pieces, bytes_max)?;
                let unpacked = bytes.len();
                Ok((request::parse(&known.signature, &head.length, vec![bytes])?, unpacked))
            };
            let (parsed, unpacked) = heavy.run(work).await?;
            lent.take(unpacked)?;
            parsed
        }
    };
    Ok(TakenIn { parsed, draft: None })
}

async fn stream<B>(
    function: &Function,
    known: &Known,
    (length, json_len): (&HeaderLength, usize),
    body: &mut BodyReader<B>,
    lent: &mut Lent<'_>,
) -> Result<TakenIn, Failure>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    if let Some(len) = body.announced() {
        length.within(len)?;
    }
    let (plan, mut rest) = if json_len == 0 {
        // Its length says its shape, so without one it has to be collected.
        match body.announced() {
            Some(len) => (request::plan_raw(&known.signature, len)?, Rest::default()),
            None => {
                let rest = Rest::new(body.collect(lent).await?);
                (request::plan_raw(&known.signature, rest.len())?, rest)
            }
        }
    } else {
        let mut rest = Rest::default();
        while rest.len() < json_len {
            let Some(piece) = body.next().await? else {
                length.within(rest.len())?;
                break;
            };
            lent.take(piece.len())?;
            rest.push(piece);
        }
        (request::plan(&known.signature, &rest.take_joined(json_len)?)?, rest)
    };
    if let Some(len) = body.announced() {
        plan.expect_rest(len.saturating_sub(json_len))?;
    }
    let Some(draft) = function.draft(plan.lens()) else {
        body.collect(lent).await?.into_iter().for_each(|piece| rest.push(piece));
        return Ok(TakenIn { parsed: plan.fill(rest)?, draft: None });
    };
    let mut sink = Sink::new(&plan, &draft)?;
    while let Some(piece) = rest.pop() {
        sink.write(&piece)?;
    }
    while let Some(piece) = body.next().await? {
        sink.write(&piece)?;
    }
    plan.expect_rest(sink.came)?;
    Ok(TakenIn { parsed: plan.without_data(), draft: Some(draft) })
}

/// Distributes the bytes behind the JSON over the inputs of a draft.
struct Sink<'a> {
    plan: &'a Plan,
    draft: &'a Draft,
    input: usize,
    at: usize,
    came: usize,
}

impl<'a> Sink<'a> {
    fn new(plan: &'a Plan, draft: &'a Draft) -> Result<Self, Failure> {
        for (input, (_, source)) in plan.inputs().iter().enumerate() {
            if let Source::Json(bytes) = source {
                draft.write(input, 0, bytes).map_err(misplaced)?;
            }
        }
        Ok(Self { plan, draft, input: 0, at: 0, came: 0 })
    }

    /// Bytes past the last input are only counted: the number goes into the error.
    fn write(&mut self, mut piece: &[u8]) -> Result<(), Failure> {
        self.came += piece.len();
        while let Some((announced, source)) = self.plan.inputs().get(self.input)
            && !piece.is_empty()
        {
            let len = match source {
                Source::Body => usize::try_from(announced.bytes).unwrap_or(usize::MAX),
                Source::Json(_) => 0,
            };
            let (now, later) = piece.split_at(piece.len().min(len.saturating_sub(self.at)));
            check::binary(announced, now)?;
            self.draft.write(self.input, self.at, now).map_err(misplaced)?;
            self.at += now.len();
            piece = later;
            if self.at >= len {
                (self.input, self.at) = (self.input + 1, 0);
            }
        }
        Ok(())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
fn misplaced(error: faaswap_slab::SlabError) -> Failure {
    Failure::Internal(format!("an input has no place in the slab: {error}"))
}

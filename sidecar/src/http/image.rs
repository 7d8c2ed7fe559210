//! A function without code: an image is posted to `/`, labels are answered.
//!
//! How images become tensors is `vision`'s; the protocol below `/v2` stays beside it. Images are decoded and resized on
//! threads of their own, so many pixels at a time, and meanwhile the broker brings the weights.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use faaswap_protocol::Timing;
use http::{HeaderValue, Method, Request, StatusCode, header};
use serde::Serialize;
use tokio::sync::Semaphore;

use super::{
    body::BodyReader,
    oip::Heavy,
    reply::{self, Reply},
    request::WantedOutput,
};
use crate::{
    broker::{InferAnswer, InferRequest, Known},
    config::Vision,
    failure::Failure,
    infer::Function,
    limits::IMAGE_PIXELS_MAX,
    metrics::Protocol,
    vision::{self, ImageError, Label, Misfit, Seen, Target},
};

/// Pixels are counted in units of so many.
const PIXELS_UNIT: u64 = 1 << 12;

/// See the module.
#[derive(Debug)]
pub struct Images {
    function: Arc<Function>,
    vision: Arc<Vision>,
    body_bytes_max: usize,
    heavy: Heavy,
    pixels: Semaphore,
}

#[derive(Serialize)]
struct Labels {
    labels: Vec<Label>,
}

impl Images {
    /// Answers for this function; no body may be longer.
    pub fn new(function: Arc<Function>, vision: Vision, body_bytes_max: usize) -> Self {
        let pixels = Semaphore::new(usize::try_from(IMAGE_PIXELS_MAX / PIXELS_UNIT).unwrap_or(Semaphore::MAX_PERMITS));
        Self { function, vision: Arc::new(vision), body_bytes_max, heavy: Heavy::new(), pixels }
    }

    /// Answers one request.
    pub async fn serve<B>(&self, request: Request<B>) -> Reply
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let (parts, body) = request.into_parts();
        let mut body = BodyReader::new(body, self.body_bytes_max, parts.headers.contains_key(header::EXPECT));
        let outcome = if parts.method == Method::POST {
            let began = Instant::now();
            let accepts = parts.headers.get(header::ACCEPT_ENCODING);
            let outcome = self.answer(&mut body, accepts).await;
            match &outcome {
                Ok((_, timing)) => self.function.note(Protocol::http, began, Ok(timing)),
                Err(failure) => self.function.note(Protocol::http, began, Err(failure)),
            }
            outcome.map(|(reply, _)| reply)
        } else {
            Err(Failure::WrongVerb { allow: "POST" })
        };
        body.discard().await;
        outcome.unwrap_or_else(|failure| reply::failure(&failure))
    }

    async fn answer<B>(
        &self,
        body: &mut BodyReader<B>,
        accepts: Option<&HeaderValue>,
    ) -> Result<(Reply, Timing), Failure>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let known = self.function.known()?;
        let target = self.vision.before.target(&known.signature)?;
        let output = self.vision.after.as_ref().map(|after| after.target(&known.signature)).transpose()?;
        let mut lent = self.function.bodies().open();
        let file = super::rest::join(body.collect(&mut lent).await?);
        let seen = vision::look(&file)?;
        self.function.announce();
        let (dims, tensor) = self.tensor(seen, file, target.clone()).await?;
        drop(lent);
        let input = InferRequest::default().input(target.index, target.dtype, &dims, tensor.into());
        let mut request = input.map_err(|error| Failure::Internal(error.to_string()))?;
        request.outputs.extend(output);
        let answer = self.function.infer(&request, None).await?;
        let timing = answer.timing;
        Ok((self.reply(&known, answer, accepts)?, timing))
    }

    async fn tensor(&self, seen: Seen, file: Bytes, target: Target) -> Result<(Vec<u64>, Vec<u8>), Failure> {
        let units = (u64::from(seen.width) * u64::from(seen.height)).div_ceil(PIXELS_UNIT);
        let units = u32::try_from(units).map_err(|error| Failure::Internal(error.to_string()))?;
        let _room = self.pixels.acquire_many(units).await.map_err(|error| Failure::Internal(error.to_string()))?;
        let vision = Arc::clone(&self.vision);
        let work = move || Ok(vision::tensor(&vision.before, &target, vision::decode(seen, &file)?)?);
        self.heavy.run(work).await
    }

    fn reply(&self, known: &Known, answer: InferAnswer, accepts: Option<&HeaderValue>) -> Result<Reply, Failure> {
        let Some(after) = &self.vision.after else {
            let count = u16::try_from(known.signature.outputs.len()).unwrap_or(u16::MAX);
            let all: Vec<_> = (0..count).map(|index| WantedOutput { index, binary: false }).collect();
            return reply::of_answer(&self.function.model_name, None, &known.signature, &all, answer)?.finish(accepts);
        };
        let output = answer.outputs.first().ok_or_else(|| Failure::Internal("the broker gave no output".to_owned()))?;
        let labels = vision::best(after, output).map_err(|error| Failure::Internal(error.to_string()))?;
        let mut reply = reply::json(StatusCode::OK, &Labels { labels });
        reply::add_timing(reply.headers_mut(), &answer.timing);
        Ok(reply)
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::Unknown | ImageError::Broken(_) => Self::Invalid(error.to_string()),
            ImageError::TooLarge { .. } => Self::TooLarge(error.to_string()),
            ImageError::NotBuilt => Self::Unsupported(error.to_string()),
        }
    }
}

impl From<Misfit> for Failure {
    fn from(misfit: Misfit) -> Self {
        match misfit {
            Misfit::Image(_) => Self::Invalid(misfit.to_string()),
            Misfit::Settings(_) => Self::Internal(misfit.to_string()),
        }
    }
}

//! Refuses a request when too many are in work.
//!
//! Outermost layer, so that nothing of an excess request is read. It never makes a request wait: whoever comes back
//! after `Retry-After` finds room, and whoever waits here would find a passed deadline.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use http::Request;
use tokio::sync::Semaphore;
use tower::{Layer, Service};

use super::reply::{self, Reply};
use crate::failure::Failure;

/// See the module.
#[derive(Clone, Debug)]
pub struct LimitLayer {
    places: Arc<Semaphore>,
}

impl LimitLayer {
    /// So many requests may be in work.
    pub fn new(requests_max: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(requests_max)) }
    }
}

impl<S> Layer<S> for LimitLayer {
    type Service = Limit<S>;

    fn layer(&self, inner: S) -> Limit<S> {
        Limit { inner, places: Arc::clone(&self.places) }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Limit<S> {
    inner: S,
    places: Arc<Semaphore>,
}

impl<S, B> Service<Request<B>> for Limit<S>
where
    S: Service<Request<B>, Response = Reply, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Reply;
    type Error = Infallible;
    type Future = super::ServiceFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            let full = reply::failure(&Failure::Busy("too many requests are in work; come back later"));
            return Box::pin(std::future::ready(Ok(full)));
        };
        let inner = self.inner.call(request);
        Box::pin(async move {
            let reply = inner.await;
            drop(place);
            reply
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[tokio::test]
    async fn the_request_past_the_limit_is_refused_at_once_and_a_finished_one_makes_room() {
        let layer = LimitLayer::new(1);
        let waiting = Arc::new(tokio::sync::Notify::new());
        let inner = tower::service_fn({
            let waiting = Arc::clone(&waiting);
            move |_: Request<()>| {
                let waiting = Arc::clone(&waiting);
                async move {
                    waiting.notified().await;
                    Ok::<_, Infallible>(reply::of_bytes(http::StatusCode::OK, ""))
                }
            }
        });
        let mut service = layer.layer(inner);
        let mut first = task::spawn(service.call(Request::new(())));
        assert_pending!(first.poll());
        let second = assert_ready!(task::spawn(service.call(Request::new(()))).poll()).unwrap();
        assert_eq!(second.status().as_u16(), 503);
        assert_eq!(second.headers()[http::header::RETRY_AFTER], "1");
        waiting.notify_one();
        assert_eq!(first.await.unwrap().status().as_u16(), 200);
        assert_pending!(task::spawn(service.call(Request::new(()))).poll());
    }
}

//! Clients over real sockets.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use faaswap_sidecar::grpc::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// A reply, read to its end.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }

    /// The text of an error body, which has nothing else.
    pub fn error(&self) -> String {
        let json = self.json();
        assert_eq!(json.as_object().map(serde_json::Map::len), Some(1), "{json}");
        json["error"].as_str().expect("an error text").to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

/// An HTTP/1.1 client.
#[derive(Clone)]
pub struct Http {
    client: Client<HttpConnector, UnsyncBoxBody<Bytes, Infallible>>,
    address: SocketAddr,
}

impl Http {
    pub fn new(address: SocketAddr) -> Self {
        Self { client: Client::builder(TokioExecutor::new()).build_http(), address }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: UnsyncBoxBody<Bytes, Infallible>,
    ) -> Reply {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let reply = self.client.request(request.body(body).unwrap()).await.expect("a reply");
        let (parts, body) = reply.into_parts();
        let body = body.collect().await.expect("a whole reply").to_bytes();
        Reply { status: parts.status, headers: parts.headers, body }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, &[], UnsyncBoxBody::default()).await
    }

    pub async fn call(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        self.send(method, path, headers, UnsyncBoxBody::new(Full::new(body.into()))).await
    }

    pub async fn post(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Reply {
        self.call(Method::POST, path, headers, body).await
    }

    /// Sends the body in chunks of this size, without saying its length.
    pub async fn post_chunked(&self, path: &str, headers: &[(&str, &str)], body: &[u8], size: usize) -> Reply {
        let chunks: Vec<_> = body.chunks(size).map(|chunk| Ok(Frame::data(Bytes::copy_from_slice(chunk)))).collect();
        let body = http_body_util::StreamBody::new(tonic::codegen::tokio_stream::iter(chunks));
        self.send(Method::POST, path, headers, UnsyncBoxBody::new(body)).await
    }

    /// An infer request in JSON.
    pub async fn infer(&self, body: &Value) -> Reply {
        self.post(&infer_path(), &[], body.to_string()).await
    }

    /// An infer request with binary tensors behind the JSON.
    pub async fn infer_binary(&self, json: &Value, tensors: &[u8]) -> Reply {
        let (length, body) = binary_body(json, tensors);
        self.post(&infer_path(), &[("inference-header-content-length", &length)], body).await
    }
}

pub fn infer_path() -> String {
    format!("/v2/models/{}/infer", super::NAME)
}

/// The length of the JSON, and the body.
pub fn binary_body(json: &Value, tensors: &[u8]) -> (String, Vec<u8>) {
    let mut body = json.to_string().into_bytes();
    let length = body.len().to_string();
    body.extend_from_slice(tensors);
    (length, body)
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|float| f32::from_le_bytes(*float)).collect()
}

pub fn bytes_of(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|float| float.to_le_bytes()).collect()
}

/// A gRPC client on the same port.
pub type Grpc = GrpcInferenceServiceClient<Client<HttpConnector, tonic::body::Body>>;

pub fn grpc(address: SocketAddr) -> Grpc {
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    GrpcInferenceServiceClient::with_origin(client, format!("http://{address}").parse().unwrap())
}

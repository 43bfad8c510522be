//! `istio.mixer.v1` over gRPC.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use mesh_telemetry::{
    attributes::{self, Bag, GLOBAL_WORDS, encode_references, proto_duration},
    proto::{
        google_rpc,
        mixer_v1::{
            CheckRequest, CheckResponse, CompressedAttributes, ReportRequest, ReportResponse,
            check_response::{PreconditionResult, QuotaResult},
            mixer_server,
        },
    },
};
use tonic::{Request, Response, Status};

use crate::{config::Config, dispatch};

/// Reports of one request; a client batches 1,000.
const MAX_REPORTS: usize = 10_000;
/// Quotas of one Check.
const MAX_QUOTAS: usize = 100;

/// What requests are answered from, and counts of them.
#[derive(Debug)]
pub(crate) struct Shared {
    pub config: ArcSwap<Config>,
    pub default_namespace: String,
    pub checks: AtomicU64,
    pub denials: AtomicU64,
    pub reports: AtomicU64,
    pub invalid: AtomicU64,
}

/// Implements `istio.mixer.v1.Mixer`. Clones share everything.
#[derive(Debug, Clone)]
pub struct MixerApi(pub(crate) Arc<Shared>);

impl Shared {
    fn decode(&self, c: &CompressedAttributes) -> Result<Bag, Status> {
        attributes::decompress(c).map_err(|e| self.refuse(&e))
    }

    fn refuse(&self, e: &attributes::DictionaryError) -> Status {
        self.invalid.fetch_add(1, Ordering::Relaxed);
        Status::invalid_argument(e.to_string())
    }
}

#[tonic::async_trait]
impl mixer_server::Mixer for MixerApi {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let shared = &*self.0;
        let request = request.into_inner();
        if request.quotas.len() > MAX_QUOTAS {
            return Err(Status::invalid_argument(format!("more than {MAX_QUOTAS} quotas")));
        }
        let bag = shared.decode(&request.attributes.unwrap_or_default())?;
        // Answered with words that the client knows.
        let words = usize::try_from(request.global_word_count).unwrap_or(usize::MAX).min(GLOBAL_WORDS.len());
        let config = shared.config.load();
        let verdict = config.check(&bag, &shared.default_namespace);
        shared.checks.fetch_add(1, Ordering::Relaxed);
        let ok = verdict.result.code == 0;
        if !ok {
            shared.denials.fetch_add(1, Ordering::Relaxed);
        }
        let cacheable = verdict.references.is_some();
        let mut response = CheckResponse {
            precondition: Some(PreconditionResult {
                status: Some(google_rpc::Status {
                    code: verdict.result.code,
                    message: verdict.result.message,
                    details: vec![],
                }),
                valid_duration: Some(proto_duration(if cacheable {
                    verdict.result.valid
                } else {
                    Default::default()
                })),
                valid_use_count: if cacheable { verdict.result.uses } else { 0 },
                referenced_attributes: verdict.references.map(|r| encode_references(&r, words)),
                route_directive: None,
            }),
            ..Default::default()
        };
        if ok {
            for (name, q) in &request.quotas {
                let dedup = match request.deduplication_id.as_str() {
                    "" => String::new(),
                    id => format!("{id}/{name}"),
                };
                let args = dispatch::quota_args(q.amount, q.best_effort, &dedup);
                let g = config.quota(&bag, &shared.default_namespace, name, args);
                response.quotas.insert(
                    name.clone(),
                    QuotaResult {
                        valid_duration: Some(proto_duration(g.grant.valid)),
                        granted_amount: g.grant.granted,
                        referenced_attributes: g.references.map(|r| encode_references(&r, words)),
                    },
                );
            }
        }
        Ok(Response::new(response))
    }

    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        let shared = &*self.0;
        let request = request.into_inner();
        if request.attributes.len() > MAX_REPORTS {
            return Err(Status::invalid_argument(format!("more than {MAX_REPORTS} reports")));
        }
        // A batch is a thousand evaluations: not on a thread that answers checks.
        let own = self.0.clone();
        let decoded = tokio::task::spawn_blocking(move || {
            let config = own.config.load_full();
            attributes::decode_report(&request, |bag| {
                config.report(bag, &own.default_namespace);
                own.reports.fetch_add(1, Ordering::Relaxed);
            })
        })
        .await
        .map_err(|e| Status::internal(e.to_string()))?;
        decoded.map_err(|e| shared.refuse(&e))?;
        Ok(Response::new(ReportResponse {}))
    }
}

// A control plane that is not ours: go-control-plane, serving what a bootstrap file says as static resources.
//
// Clusters, endpoints, listeners and routes are taken apart, so that each is a resource of its own. Standard input names
// nodes and files, "NODE PATH" a line; each file becomes the snapshot of its node. What happens is told on standard
// output: "listening ADDRESS", "serving NODE VERSION", "ack TYPE VERSION", "nack TYPE MESSAGE".
package main

import (
	"bufio"
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	bootstrap "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
)

type byID struct{}

func (byID) ID(n *core.Node) string { return n.GetId() }

var (
	mu  sync.Mutex
	out = bufio.NewWriter(os.Stdout)
)

func say(format string, args ...any) {
	mu.Lock()
	defer mu.Unlock()
	fmt.Fprintln(out, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " "))
	out.Flush()
}

func ads() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:    core.ApiVersion_V3,
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
	}
}

// Takes the resources of a file apart.
func snapshot(path string, version int) (*cache.Snapshot, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var b bootstrap.Bootstrap
	if err := protojson.Unmarshal(text, &b); err != nil {
		return nil, err
	}
	resources := map[resource.Type][]types.Resource{}
	for _, c := range b.GetStaticResources().GetClusters() {
		if c.GetType() == cluster.Cluster_STATIC {
			assignment := c.LoadAssignment
			if assignment == nil {
				assignment = &endpoint.ClusterLoadAssignment{}
			}
			assignment.ClusterName = c.Name
			resources[resource.EndpointType] = append(resources[resource.EndpointType], assignment)
			c.LoadAssignment = nil
			c.ClusterDiscoveryType = &cluster.Cluster_Type{Type: cluster.Cluster_EDS}
			c.EdsClusterConfig = &cluster.Cluster_EdsClusterConfig{EdsConfig: ads()}
		}
		resources[resource.ClusterType] = append(resources[resource.ClusterType], c)
	}
	for _, l := range b.GetStaticResources().GetListeners() {
		for i, chain := range l.FilterChains {
			for _, f := range chain.Filters {
				manager := new(hcm.HttpConnectionManager)
				if f.GetTypedConfig().UnmarshalTo(manager) != nil {
					continue
				}
				routes := manager.GetRouteConfig()
				if routes == nil {
					continue
				}
				routes.Name = fmt.Sprintf("%s-%d", l.Name, i)
				resources[resource.RouteType] = append(resources[resource.RouteType], routes)
				manager.RouteSpecifier = &hcm.HttpConnectionManager_Rds{
					Rds: &hcm.Rds{ConfigSource: ads(), RouteConfigName: routes.Name},
				}
				packed, err := anypb.New(manager)
				if err != nil {
					return nil, err
				}
				f.ConfigType = &listener.Filter_TypedConfig{TypedConfig: packed}
			}
		}
		resources[resource.ListenerType] = append(resources[resource.ListenerType], l)
	}
	s, err := cache.NewSnapshot(strconv.Itoa(version), resources)
	if err != nil {
		return nil, err
	}
	return s, s.Consistent()
}

func short(typeURL string) string { return typeURL[strings.LastIndex(typeURL, ".")+1:] }

func main() {
	snapshots := cache.NewSnapshotCache(true, byID{}, nil)
	callbacks := server.CallbackFuncs{
		StreamRequestFunc: func(_ int64, r *discovery.DiscoveryRequest) error {
			if r.ErrorDetail != nil {
				say("nack %s %s", short(r.TypeUrl), r.ErrorDetail.Message)
			} else if r.ResponseNonce != "" {
				say("ack %s %s", short(r.TypeUrl), r.VersionInfo)
			}
			return nil
		},
		StreamDeltaRequestFunc: func(_ int64, r *discovery.DeltaDiscoveryRequest) error {
			if r.ErrorDetail != nil {
				say("nack %s %s", short(r.TypeUrl), r.ErrorDetail.Message)
			} else if r.ResponseNonce != "" {
				say("ack %s delta", short(r.TypeUrl))
			}
			return nil
		},
	}
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	s := grpc.NewServer()
	discovery.RegisterAggregatedDiscoveryServiceServer(s, server.NewServer(context.Background(), snapshots, callbacks))
	go func() { log.Fatal(s.Serve(socket)) }()
	say("listening %s", socket.Addr())
	lines := bufio.NewScanner(os.Stdin)
	for version := 1; lines.Scan(); version++ {
		node, path, _ := strings.Cut(lines.Text(), " ")
		next, err := snapshot(path, version)
		if err != nil {
			log.Fatalf("%s: %v", path, err)
		}
		if err := snapshots.SetSnapshot(context.Background(), node, next); err != nil {
			log.Fatal(err)
		}
		say("serving %s %d", node, version)
	}
	// Whoever started this is gone.
}

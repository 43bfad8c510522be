// A foreign client of SPIFFE bundle endpoints: SPIFFE's own library, go-spiffe.
//
//	bundle web    TRUST_DOMAIN URL ROOTS_FILE
//	bundle spiffe TRUST_DOMAIN URL BUNDLE_FILE ENDPOINT_ID
//	bundle serve  TRUST_DOMAIN BUNDLE_FILE CERT_FILE KEY_FILE
//
// The first two fetch a bundle and print it: sequence, refresh hint in seconds, and the SHA-256 of each root. The last one
// serves one with the library's handler, and prints its address.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 4 {
		return fmt.Errorf("too few arguments")
	}
	domain, err := spiffeid.TrustDomainFromString(args[1])
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	switch args[0] {
	case "web":
		pem, err := os.ReadFile(args[3])
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("no roots in %s", args[3])
		}
		b, err := federation.FetchBundle(ctx, domain, args[2], federation.WithWebPKIRoots(pool))
		return show(b, err)
	case "spiffe":
		held, err := spiffebundle.Load(domain, args[3])
		if err != nil {
			return err
		}
		id, err := spiffeid.FromString(args[4])
		if err != nil {
			return err
		}
		b, err := federation.FetchBundle(ctx, domain, args[2], federation.WithSPIFFEAuth(held, id))
		return show(b, err)
	case "serve":
		b, err := spiffebundle.Load(domain, args[2])
		if err != nil {
			return err
		}
		handler, err := federation.NewHandler(domain, b)
		if err != nil {
			return err
		}
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		fmt.Println(listener.Addr())
		return http.ServeTLS(listener, handler, args[3], args[4])
	}
	return fmt.Errorf("unknown command %s", args[0])
}

func show(b *spiffebundle.Bundle, err error) error {
	if err != nil {
		return err
	}
	sequence, _ := b.SequenceNumber()
	hint, _ := b.RefreshHint()
	fmt.Printf("sequence %d\nhint %d\n", sequence, int(hint.Seconds()))
	for _, root := range b.X509Authorities() {
		fmt.Printf("root %x\n", sha256.Sum256(root.Raw))
	}
	return nil
}

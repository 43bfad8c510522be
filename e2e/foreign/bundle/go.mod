module flotilla.dev/foreign/bundle

go 1.21

require github.com/spiffe/go-spiffe/v2 v2.1.7

require (
	github.com/go-jose/go-jose/v3 v3.0.1 // indirect
	github.com/zeebo/errs v1.3.0 // indirect
	golang.org/x/crypto v0.17.0 // indirect
)

// A registry with a route for referrers: go-containerregistry's own, with the option that its programs leave off.
package main

import (
	"flag"
	"log"
	"net/http"

	"github.com/google/go-containerregistry/pkg/registry"
)

func main() {
	address := flag.String("address", "127.0.0.1:5000", "address to listen on")
	disk := flag.String("disk", "", "folder of the blobs")
	flag.Parse()
	handler := registry.New(
		registry.WithReferrersSupport(true),
		registry.WithBlobHandler(registry.NewDiskBlobHandler(*disk)),
	)
	log.Fatal(http.ListenAndServe(*address, handler))
}

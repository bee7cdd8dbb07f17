// Command s3 serves the folders under one directory as S3 buckets, for the embedded cluster.
// It is versitygw's own gateway with a POSIX backend and one root user, whose key comes from
// ROOT_ACCESS_KEY and ROOT_SECRET_KEY so that it shows in no process list.
package main

import (
	"context"
	"flag"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/embedgw"
)

func main() {
	address := flag.String("address", "127.0.0.1:7070", "host:port to listen on")
	region := flag.String("region", "us-east-1", "region that requests must be signed for")
	folder := flag.String("folder", "", "directory whose sub-directories are the buckets")
	certificate := flag.String("tls-cert", "", "certificate file; plain HTTP without one")
	key := flag.String("tls-key", "", "key file of the certificate")
	flag.Parse()
	if *folder == "" {
		log.Fatal("-folder is missing: name the directory that holds the buckets")
	}
	if err := serve(*address, *region, *folder, *certificate, *key); err != nil {
		log.Fatal(err)
	}
}

func serve(address, region, folder, certificate, key string) error {
	backend, err := posix.New(folder, meta.XattrMeta{}, posix.PosixOpts{})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	return embedgw.RunVersityGW(ctx, backend, &embedgw.Config{
		RootUserAccess:    os.Getenv("ROOT_ACCESS_KEY"),
		RootUserSecret:    os.Getenv("ROOT_SECRET_KEY"),
		Region:            region,
		Ports:             []string{address},
		CertFile:          certificate,
		KeyFile:           key,
		MaxConnections:    1024,
		MaxRequests:       512,
		MultipartMaxParts: 10000,
		HealthPath:        "/health",
		KeepAlive:         true,
		Quiet:             true,
	})
}

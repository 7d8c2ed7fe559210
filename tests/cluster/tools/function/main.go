// Command function is what users write: it takes requests from the cluster and asks the sidecar in its pod.
//
// Its image has no shell, so it shows files (`function FILE...`) and variables (`function env`) itself. As KServe's storage
// initializer (`function http://... FOLDER`) it fetches a model.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"path"
	"strings"
	"syscall"
)

func main() {
	if len(os.Args) == 3 && strings.HasPrefix(os.Args[1], "http://") {
		fetch(os.Args[1], os.Args[2])
		return
	}
	if len(os.Args) > 1 {
		show(os.Args[1:])
		return
	}
	sidecar, err := url.Parse(os.Getenv("FAASWAP_SIDECAR_URL"))
	if err != nil || sidecar.Host == "" {
		log.Fatalf("FAASWAP_SIDECAR_URL is %q: no sidecar was injected", os.Getenv("FAASWAP_SIDECAR_URL"))
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	go func() {
		<-ended
		os.Exit(0)
	}()
	http.HandleFunc("/ready", func(http.ResponseWriter, *http.Request) {})
	http.Handle("/", httputil.NewSingleHostReverseProxy(sidecar))
	log.Fatal(http.ListenAndServe(":8080", nil))
}

func show(what []string) {
	for _, one := range what {
		if one == "env" {
			for _, variable := range os.Environ() {
				fmt.Println(variable)
			}
			continue
		}
		text, err := os.ReadFile(one)
		if err != nil {
			log.Fatal(err)
		}
		os.Stdout.Write(text)
	}
}

func fetch(from, folder string) {
	reply, err := http.Get(from)
	if err != nil || reply.StatusCode != http.StatusOK {
		log.Fatalf("%s: %v %v", from, reply, err)
	}
	model, err := io.ReadAll(reply.Body)
	if err == nil {
		err = os.WriteFile(path.Join(folder, path.Base(from)), model, 0o644)
	}
	if err != nil {
		log.Fatal(err)
	}
}

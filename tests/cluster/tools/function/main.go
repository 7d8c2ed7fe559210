// Command function is what users write: it takes requests from the cluster and asks the sidecar in its pod.
//
// `function FILE...` shows files and `function env` variables: its image has no shell to do so.
package main

import (
	"fmt"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"syscall"
)

func main() {
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
